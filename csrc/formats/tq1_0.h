// w = d · (q - 1), q in 0, 1, 2; five weights a byte
//
//   byte 0    48   52  54
//        | qs | qh | d |
//
//   A byte is the fraction byte / 256 in base 3: digit n after the point is ⌊3 · (byte · 3^n mod 256) / 256⌋.
//   qs   32 bytes: digit n of byte j is weight 32n + j; then 16 bytes: weight 160 + 16n + j
//   qh   4 bytes of four digits: weight 240 + 4n + j
#pragma once

#include "formats/common.h"

namespace gemmart {

struct GEMMART_PACKED BlockTQ1_0 {
    static constexpr int kSize = 256;
    uint8_t qs[48];
    uint8_t qh[4];
    uint16_t d;  // half
};
static_assert(sizeof(BlockTQ1_0) == 54);

// Weights n_bytes · n + j for n in [0, n_digits), j in [0, n_bytes).
static inline GEMMART_HD void tq1_0_digits(float d, const uint8_t* bytes, int n_bytes, int n_digits, float* out) {
    for (int j = 0; j < n_bytes; j++) {
        unsigned fraction = bytes[j];
        for (int n = 0; n < n_digits; n++) {
            out[n_bytes * n + j] = d * (static_cast<int>(fraction * 3 >> 8) - 1);
            fraction = fraction * 3 & 255;
        }
    }
}

static inline GEMMART_HD void decode(const BlockTQ1_0& b, float* out) {
    const float d = half_to_float(b.d);
    tq1_0_digits(d, b.qs, 32, 5, out);
    tq1_0_digits(d, b.qs + 32, 16, 5, out + 160);
    tq1_0_digits(d, b.qh, 4, 4, out + 240);
}

}  // namespace gemmart
