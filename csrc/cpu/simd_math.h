// What the element-wise kernels and attention share, written once on the vectors of simd_<isa>.h, which is included
// before this file: exp, tanh, sums, rounding to int8.
#pragma once

namespace gemmart::cpu {
namespace {

// e^x = 2^n · (1 + p): n, and p = e^r - 1 for the rest |r| <= ln 2 / 2; near x = 0 p is accurate to the last bits.
struct ExpParts {
    Vec n, p;
};
inline ExpParts exp_parts(Vec x) {
    constexpr float kLog2e = 1.44269504f, kLn2High = 0.693147182f, kLn2Low = -1.90465421e-9f;
    const Vec n = round_to_integer(x * splat(kLog2e));
    const Vec r = fma(n, splat(-kLn2Low), fma(n, splat(-kLn2High), x));
    // (e^r - 1 - r) / r², error of e^r below 4e-9: least maximum, fitted
    Vec q = splat(0x1.6a23cep-10f);
    q = fma(q, r, splat(0x1.123a2p-7f));
    q = fma(q, r, splat(0x1.5558f2p-5f));
    q = fma(q, r, splat(0x1.555492p-3f));
    q = fma(q, r, splat(0x1.fffffcp-2f));
    return {n, fma(q * r, r, r)};
}

// Within 1 unit in the last place; 0, infinity and NaN where they belong.
inline Vec exp(Vec x) {
    const ExpParts e = exp_parts(max(splat(-104), min(splat(89), x)));
    return times_power_of_2(e.p + splat(1), e.n);
}

// With e = e^2|x| - 1: e / (e + 2). Within a few units in the last place, near 0 too.
inline Vec tanh(Vec x) {
    const ExpParts e = exp_parts(min(splat(20), magnitude(x) * splat(2)));
    const Vec power = times_power_of_2(splat(1), e.n);
    const Vec expm1 = fma(power, e.p, power - splat(1));
    return with_sign_of(expm1 / (expm1 + splat(2)), x);
}

inline Vec capped(Vec x, float cap) { return splat(cap) * tanh(x * splat(1 / cap)); }

// A sum by a fixed tree; n is a power of 2. Overwrites x.
inline float tree_sum(float* x, int n) {
    for (int half = n / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
}

inline float magnitude_of_32(const float* x) {
    Vec largest = magnitude(load(x));
    for (int i = kLanes; i < 32; i += kLanes) largest = max_bits(largest, magnitude(load(x + i)));
    return largest_bits_of(largest);
}

inline bool is_normal(float x) { return x >= 0x1p-126f && x < 0x1p127f; }

inline void round_32(const float* x, float inverse, int8_t* q) {
    for (int i = 0; i < 32; i += kLanes) store_int8(q + i, load(x + i) * splat(inverse));
}

inline void clear_32(int8_t* q) {
    for (int i = 0; i < 32; i += kLanes) store_int8(q + i, splat(0));
}

// Rounds 32 numbers to x ≈ scale · q and returns the scale, largest |x| / 127. Where that is not a normal number q is
// zero: too small to divide by, or infinite or NaN, which then shows in every product.
inline float round_to_int8(const float* x, int8_t* q) {
    const float max = magnitude_of_32(x), scale = max / 127;
    if (is_normal(scale))
        round_32(x, 127 / max, q);
    else
        clear_32(q);
    return scale;
}

}  // namespace
}  // namespace gemmart::cpu
