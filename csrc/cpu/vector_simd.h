// The element-wise kernels on the vectors of simd_<isa>.h. Every element is computed by the same operations wherever
// it stands: the last, partial vector is a masked one.
#pragma once

#include <cstring>

#include "cpu/simd_math.h"
#include "cpu/tables.h"

namespace gemmart::cpu {
namespace {

int sum_of_16(const int8_t* q) {
    // bytes + 128, summed without sign
    const __m128i bytes =
        _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)), _mm_set1_epi8(static_cast<char>(0x80)));
    const __m128i sums = _mm_sad_epu8(bytes, _mm_setzero_si128());
    return _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 16 * 128;
}

void quantize(const float* const* x, int n, int w, int n_cols, const ActivationArrays& to) {
    for (int g = 0; g < n_cols / kGroup; ++g)
        for (int c = 0; c < n; ++c) {
            const float* block = x[c] + g * kGroup;
            const int at = (g * w + c) * kGroup;
            int8_t *q = to.q + at, *low = to.q_low ? to.q_low + at : nullptr;
            const float coarse = activation_scale(magnitude_of_32(block) / 127), scale = low ? coarse / 256 : coarse;
            if (is_normal(scale) && is_normal(coarse)) {
                const float inverse = 1 / coarse;
                round_32(block, inverse, q);
                for (int i = 0; low && i < kGroup; i += kLanes) {
                    const Vec rest = fma(load_int8(q + i), splat(-coarse), load(block + i));
                    store_int8(low + i, max(splat(-127), min(splat(127), rest * splat(256 * inverse))));
                }
            } else {
                clear_32(q);
                if (low) clear_32(low);
            }
            const int sum0 = sum_of_16(q), sum1 = sum_of_16(q + 16);
            if (low)
                put_sums(to, g, w, c, scale, 256 * sum0 + sum_of_16(low), 256 * sum1 + sum_of_16(low + 16));
            else
                put_sums(to, g, w, c, scale, sum0, sum1);
        }
}

// out[i] = f(x[i], y[i])
template <class F>
void for_each(float* out, const float* x, const float* y, int n, F f) {
    for (int i = 0; i < n; i += kLanes) store_n(out + i, f(load_n(x + i, n - i), load_n(y + i, n - i)), n - i);
}

void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
    Vec squares[16 / kLanes] = {};
    for (int i = 0; i < n; i += kLanes) {
        const Vec v = load_n(x + i, n - i);
        Vec& lanes = squares[i % 16 / kLanes];
        lanes = fma(v, v, lanes);
    }
    float lanes[16];
    for (int i = 0; i < 16; i += kLanes) store(lanes + i, squares[i / kLanes]);
    const float mean = tree_sum(lanes, 16) / n;
    const float scale = 1 / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(mean + eps)));
    for_each(out, x, weight, n, [scale](Vec a, Vec b) { return a * splat(scale) * b; });
}

void add(float* x, const float* y, int n) {
    for_each(x, x, y, n, [](Vec a, Vec b) { return a + b; });
}

void scale(float* x, float s, int n) {
    for_each(x, x, x, n, [s](Vec a, Vec) { return a * splat(s); });
}

void gate(Activation act, const float* gate, const float* up, int n, float* out) {
    constexpr float kRoot = 0.7978845608028654f;  // sqrt(2 / pi)
    // x / 2 · (1 + tanh(u)) = x / (1 + exp(-2 u)): no cancellation
    if (act == Activation::Gelu)
        for_each(out, gate, up, n, [](Vec x, Vec y) {
            const Vec u = splat(2 * kRoot) * fma(splat(0.044715f) * x * x, x, x);
            return x / (splat(1) + exp(-u)) * y;
        });
    else
        for_each(out, gate, up, n, [](Vec x, Vec y) { return x / (splat(1) + exp(-x)) * y; });
}

void softcap(float* x, int n, float cap) {
    for_each(x, x, x, n, [cap](Vec v, Vec) { return capped(v, cap); });
}

bool all_finite(const float* x, int n) {
    Vec largest = splat(0);
    for (int i = 0; i < n; i += kLanes) largest = max_bits(largest, magnitude(load_n(x + i, n - i)));
    return largest_bits_of(largest) <= 3.40282347e38f;
}

int find_above(const float* x, int begin, int n, float limit) {
    for (int i = begin; i < n; i += kLanes)
        if (const uint32_t found = greater(load_n(x + i, n - i), splat(limit)); found)
            return i + __builtin_ctz(found);  // n where only lanes beyond the last, which are zero, are above
    return n;
}

double sum_exp(const float* x, int n, float from) {
    constexpr int kRun = 16 * kLanes;  // numbers that are added in float32
    double lanes[kLanes] = {}, sum = 0;
    for (int begin = 0; begin < n; begin += kRun) {
        Vec run = splat(0);
        for (int i = begin; i < n && i < begin + kRun; i += kLanes) {
            const Vec power = exp(load_n(x + i, n - i) - splat(from));
            run = run + (n - i < kLanes ? keep(power, (1u << (n - i)) - 1, 0) : power);
        }
        float sums[kLanes];
        store(sums, run);
        for (int i = 0; i < kLanes; ++i) lanes[i] += sums[i];
    }
    for (double lane : lanes) sum += lane;
    return sum;
}

void rope(float* x, const float* cosines, const float* sines, int head_dim, bool neox) {
    const int half = head_dim / 2;
    if (neox) {
        for (int i = 0; i < half; i += kLanes) {
            const int n = half - i;
            const Vec a = load_n(x + i, n), b = load_n(x + half + i, n);
            const Vec cosine = load_n(cosines + i, n), sine = load_n(sines + i, n);
            store_n(x + i, fma(a, cosine, -(b * sine)), n);
            store_n(x + half + i, fma(b, cosine, a * sine), n);
        }
    } else {
        for (int i = 0; i < head_dim; i += kLanes) {
            const int n = head_dim - i;
            const Vec pairs = load_n(x + i, n);
            const Vec other = swap_pairs(pairs) * load_pairs(sines + i / 2, n);
            store_n(x + i, fma_alternate(pairs, load_pairs(cosines + i / 2, n), other), n);
        }
    }
}

// Interleaving only moves numbers; the scalar kernel stays.
void fill_vector(Kernels& k) {
    k.quantize = quantize;
    k.rms_norm = rms_norm;
    k.add = add;
    k.scale = scale;
    k.gate = gate;
    k.softcap = softcap;
    k.all_finite = all_finite;
    k.find_above = find_above;
    k.sum_exp = sum_exp;
    k.rope = rope;
}

}  // namespace
}  // namespace gemmart::cpu
