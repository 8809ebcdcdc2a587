// Keys of attention over additive codes at one SIMD level: decoded, rotated and scored in whole
// numbers, so that every level gives the same ones. See additive_attend.h.

#if COMMVQ_X86 && COMMVQ_LANES == 16
#include "cpu/additive_attend_keys_avx512.h"
#else
#include "cpu/additive_attend_keys_plain.h"
#endif
