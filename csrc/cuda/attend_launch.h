// What the two ways to attend over codes share: few rows of queries (additive_attend.cu) and many
// (additive_attend_rows.cu).
#pragma once

#include "cuda/attend_plan.h"
#include "cuda/launch.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace commvq::gpu {

constexpr int64_t kMostGrid = 65535; // of a grid's second and third axis

// What the splits of all units leave for the merge.
struct Partial {
  Tensor sums, peaks, totals;

  // Room for a.splits of them, to which `a` then points; peaks and totals `copies` times.
  Partial(AttendArguments& a, const Tensor& like, int64_t units, int64_t copies = 1)
      : sums(torch::stable::new_empty(like, {count(a, units) * a.dim})),
        peaks(torch::stable::new_empty(like, {copies * count(a, units)})),
        totals(torch::stable::new_empty(like, {copies * count(a, units)})) {
    a.sums = sums.mutable_data_ptr<float>();
    a.peaks = peaks.mutable_data_ptr<float>();
    a.totals = totals.mutable_data_ptr<float>();
  }

  static int64_t count(const AttendArguments& a, int64_t units) {
    return units * a.splits * a.queries;
  }
};

// Sets both sides' pages, and lowers the keys' group to what kernels add as bytes.
template <class KeyLayout, class ValueLayout>
void set_pages(AttendArguments& a, int tiles, int warps, size_t limit) {
  const auto page = [&](const AttendSide& side, auto stages_that_fit) {
    const int words = slice_width(side.sub_dim) / kSliceStep;
    const int found = stages_that_fit(side.stages, words, tiles, warps, limit);
    STD_TORCH_CHECK(found > 0, "additive_attend: this GPU has too little shared memory");
    return found;
  };
  a.keys.page = page(a.keys, stages_a_page<KeyLayout>);
  a.values.page = page(a.values, stages_a_page<ValueLayout>);
  a.keys.group = usable_group(a.keys.group, a.keys.stages, a.keys.page);
}

// Whether blocks of many rows fit the device; if so, launches them on its stream.
bool rows_fit(const AttendArguments& a, const Device& device);
Partial attend_rows(AttendArguments& a, const Device& device, const Tensor& like, int64_t units);

} // namespace commvq::gpu
