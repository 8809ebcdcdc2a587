// exp of a vector of floats. Included inside a level's namespace, after lanes.h; no include guard
// on purpose.

// exp(x) for x in [-80, 0], to a few units in the last place: x = n ln 2 + rest, a polynomial for
// the rest, n into the exponent.
COMMVQ_INLINE Lanes exponential(Lanes x) {
  const Lanes magic = broadcast(12582912.0f); // 1.5 * 2^23: adding it rounds to whole numbers
  const Lanes whole = (x * broadcast(1.44269504f) + magic) - magic;
  const Lanes rest = (x - whole * broadcast(0.693359375f)) - whole * broadcast(-2.12194440e-4f);
  Lanes sum = broadcast(1.9875691500e-4f);
  sum = sum * rest + broadcast(1.3981999507e-3f);
  sum = sum * rest + broadcast(8.3334519073e-3f);
  sum = sum * rest + broadcast(4.1665795894e-2f);
  sum = sum * rest + broadcast(1.6666665459e-1f);
  sum = sum * rest + broadcast(5.0000001201e-1f);
  sum = (sum * (rest * rest) + rest) + broadcast(1.0f);
  const Ints exponent = (__builtin_convertvector(whole, Ints) + 127) << 23;
  return sum * (Lanes)exponent;
}
