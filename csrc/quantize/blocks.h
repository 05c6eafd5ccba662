// Blocks of 32 weights with one scale, or a scale and a minimum: Q8_0, Q4_0, Q5_0, IQ4_NL, Q4_1, Q5_1.
#pragma once

#include "formats/iq4_nl.h"
#include "formats/q4_0.h"
#include "formats/q4_1.h"
#include "formats/q5_0.h"
#include "formats/q5_1.h"
#include "formats/q8_0.h"
#include "quantize/search.h"

namespace gemmart {

// x ≈ d · l. Sets d, a half, and gives the index of each weight's level.
template <typename Grid>
std::array<int, 32> encode_steps(const float* x, const float* w, float least, float most, uint16_t& d) {
    const float size = std::abs(extreme(x, 32));
    float unit[32];
    for (int i = 0; i < 32; i++) unit[i] = x[i] * reciprocal(size);
    d = scale_to_half(size * best_step<Grid>(unit, w, 32, least, most), size);
    const float inverse = reciprocal(half_to_float(d));
    std::array<int, 32> index;
    for (int i = 0; i < 32; i++) index[i] = Grid::index(Grid::nearest(x[i] * inverse));
    return index;
}

// x ≈ d · l + m.
template <int kMost>
std::array<int, 32> encode_line(const float* x, const float* w, uint16_t& d, uint16_t& m) {
    const float size = std::abs(extreme(x, 32));
    float unit[32];
    for (int i = 0; i < 32; i++) unit[i] = x[i] * reciprocal(size);
    const Line line = best_line<kMost, false>(unit, w, 32);
    d = scale_to_half(size * line.d, size), m = cpu::float_to_half(-size * line.m);
    const float inverse = reciprocal(half_to_float(d)), start = half_to_float(m);
    std::array<int, 32> index;
    for (int i = 0; i < 32; i++) index[i] = static_cast<int>(Whole<0, kMost>::nearest((x[i] - start) * inverse));
    return index;
}

inline void pack_nibbles(const std::array<int, 32>& q, uint8_t* qs) {
    for (int i = 0; i < 16; i++) qs[i] = static_cast<uint8_t>((q[i] & 15) | (q[i + 16] & 15) << 4);
}

inline uint32_t fifth_bits(const std::array<int, 32>& q) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; i++) bits |= static_cast<uint32_t>(q[i] >> 4 & 1) << i;
    return bits;
}

inline void encode(const float* x, const float* w, BlockQ8_0& b) {
    uint16_t d;
    // So near to each other that weights which stand on such a grid are found to.
    const auto q = encode_steps<Whole<-127, 127>>(x, w, 0.93f, 1.01f, d);
    b.d = d;
    for (int i = 0; i < 32; i++) b.qs[i] = static_cast<int8_t>(q[i] - 127);
}

inline void encode(const float* x, const float* w, BlockQ4_0& b) {
    uint16_t d;
    pack_nibbles(encode_steps<Whole<-8, 7>>(x, w, 0.8f, 1.5f, d), b.qs);
    b.d = d;
}

inline void encode(const float* x, const float* w, BlockQ5_0& b) {
    uint16_t d;
    const auto q = encode_steps<Whole<-16, 15>>(x, w, 0.8f, 1.2f, d);
    pack_nibbles(q, b.qs);
    b.d = d, b.qh = fifth_bits(q);
}

inline void encode(const float* x, const float* w, BlockIQ4_NL& b) {
    uint16_t d;
    pack_nibbles(encode_steps<Iq4>(x, w, 0.8f, 1.5f, d), b.qs);
    b.d = d;
}

inline void encode(const float* x, const float* w, BlockQ4_1& b) {
    uint16_t d, m;
    pack_nibbles(encode_line<15>(x, w, d, m), b.qs);
    b.d = d, b.m = m;
}

inline void encode(const float* x, const float* w, BlockQ5_1& b) {
    uint16_t d, m;
    const auto q = encode_line<31>(x, w, d, m);
    pack_nibbles(q, b.qs);
    b.d = d, b.m = m, b.qh = fifth_bits(q);
}

}  // namespace gemmart
