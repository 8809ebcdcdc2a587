// Attention of a few queries over exact tokens, all of which every query sees, merged with what
// they have seen elsewhere: the end of a decoding step over codes that have no operator for all of
// it.
#include "cpu/exact_attend.h"
#include "common/attend_checks.h"
#include "cpu/exact_attend_rows.h"
#include "cpu/simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#define COMMVQ_KERNEL "cpu/exact_attend_kernel.h"
#include "cpu/each_level.h"

namespace commvq {

const ExactAttendKernels& exact_attend_kernels() {
  return level_kernels();
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAlone = 1 << 18; // multiply-adds that another thread is worth

Tensor exact_attend(
    const Tensor& query,
    const Tensor& keys,
    const Tensor& values,
    const Tensor& sink_keys,
    const Tensor& sink_values,
    const Tensor& weighted,
    const Tensor& peak,
    const Tensor& total,
    double softcap) {
  STD_TORCH_CHECK(
      query.scalar_type() == ScalarType::Float && query.dim() == 4,
      "exact_attend: query must be float32 [batch, heads, queries, dim]");
  const int64_t units = query.size(0) * query.size(1), rows = query.size(2), dim = query.size(3);
  for (const Tensor* x : {&weighted, &peak, &total}) {
    STD_TORCH_CHECK(
        x->scalar_type() == ScalarType::Float &&
            x->numel() == units * rows * (x == &weighted ? dim : 1),
        "exact_attend: weighted, peak and total must be float32 [batch, heads, queries, ..]");
  }
  const auto part = [&](const char* name, const Tensor& x, const Tensor& like) {
    return part_of("exact_attend", name, x, like, query.size(0), query.size(1), dim);
  };
  const Part own_keys = part("keys", keys, values), own_values = part("values", values, keys);
  const Part sinks = part("sink_keys", sink_keys, sink_values);
  const Part of_sinks = part("sink_values", sink_values, sink_keys);
  const Tensor q = without_gaps(query), w = without_gaps(weighted);
  const Tensor p = without_gaps(peak), t = without_gaps(total);
  Tensor output = torch::stable::new_empty(query, {query.size(0), query.size(1), rows, dim});
  const ExactRows work = {
      query.size(1),
      rows,
      dim,
      q.const_data_ptr<float>(),
      w.const_data_ptr<float>(),
      p.const_data_ptr<float>(),
      t.const_data_ptr<float>(),
      static_cast<float>(softcap),
      {own_keys, sinks},
      {own_values, of_sinks},
      output.mutable_data_ptr<float>()};
  const int64_t grain = 1 + kAlone / std::max<int64_t>(work.work(), 1);
  torch::stable::parallel_for(0, units, grain, [&](int64_t from, int64_t to) {
    for (int64_t unit = from; unit < to; ++unit) {
      work.run(unit);
    }
  });
  return output;
}

} // namespace
} // namespace commvq

STABLE_TORCH_LIBRARY_IMPL(commvq, CPU, m) {
  m.impl("exact_attend", TORCH_BOX(&commvq::exact_attend));
}
