// The arithmetic of the product E-step at one SIMD level; see product_estep.h for the contracts.

static float pair_distances(
    const float* left,
    const float* right,
    const float* table,
    int64_t count,
    int64_t width,
    float norm,
    float* distance) {
  Lanes least = broadcast(__builtin_inff());
  for (int64_t a = 0; a < count; ++a, table += width, distance += width) {
    const Lanes start = broadcast(norm + left[a]);
    for (int64_t b = 0; b < width; b += COMMVQ_LANES) {
      const Lanes sum = (load(right + b) + load(table + b)) + start;
      store(distance + b, sum);
      least = smaller(sum, least);
    }
  }
  float result = least[0];
  for (int lane = 1; lane < COMMVQ_LANES; ++lane) {
    result = least[lane] < result ? least[lane] : result;
  }
  return result;
}

static int64_t pairs_near(const float* distance, int64_t size, float limit, int32_t* place) {
  const Lanes most = broadcast(limit);
  int64_t found = 0;
  for (int64_t i = 0; i < size; i += COMMVQ_LANES) {
    for (uint64_t bits = at_most(load(distance + i), most); bits != 0; bits &= bits - 1) {
      place[found++] = static_cast<int32_t>(i + __builtin_ctzll(bits));
    }
  }
  return found;
}

static const EstepKernels kernels = {pair_distances, pairs_near};
