// Super-blocks of 256 weights, groups of which have whole-number scales of one common scale, and minimums likewise:
// Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS. The common scale and the groups' numbers are fitted in turn.
#pragma once

#include "formats/iq4_xs.h"
#include "formats/q2_k.h"
#include "formats/q3_k.h"
#include "formats/q5_k.h"
#include "formats/q6_k.h"
#include "quantize/search.h"

namespace gemmart {

constexpr int kSuperBlock = 256;
constexpr int kRounds = 3;  // of fitting in turn

// x ≈ (d · scale) · l, a scale kLow … kHigh for each kGroup weights.
template <int kGroup>
struct Steps {
    static constexpr int kGroups = kSuperBlock / kGroup;
    uint16_t d;  // half
    int scale[kGroups];
    int index[kSuperBlock];  // of each weight's level
};

template <typename Grid, int kGroup, int kLow, int kHigh>
Steps<kGroup> fit_steps(const float* x, const float* w, float most) {
    constexpr int kGroups = kSuperBlock / kGroup;
    Steps<kGroup> out{};
    const float size = std::abs(extreme(x, kSuperBlock));
    float unit[kSuperBlock], step[kGroups], d = 0;
    for (int i = 0; i < kSuperBlock; i++) unit[i] = x[i] * reciprocal(size);
    for (int k = 0; k < kGroups; k++) step[k] = best_step<Grid>(unit + k * kGroup, w + k * kGroup, kGroup, 0.8f, most);
    d = extreme(step, kGroups) / kLow;
    for (int round = 0; round < kRounds; round++) {
        out.d = scale_to_half(size * d, size);
        d = half_to_float(out.d) * reciprocal(size);
        float xl = 0, ll = 0;
        for (int k = 0; k < kGroups; k++) {
            const float *const xs = unit + k * kGroup, *const ws = w + k * kGroup;
            const int middle = static_cast<int>(std::lround(std::clamp<float>(step[k] * reciprocal(d), kLow, kHigh)));
            Lanes steps{};
            const int first = std::clamp(middle - kLanes / 2, kLow, kHigh + 1 - kLanes);
            for (int c = 0; c < kLanes; c++) steps[c] = d * (first + c);
            out.scale[k] = first + best_of_steps<Grid>(xs, ws, kGroup, steps);
            const float inverse = reciprocal(d * out.scale[k]);
            for (int j = 0; j < kGroup; j++) {
                const float l = Grid::nearest(xs[j] * inverse), sl = out.scale[k] * l;
                out.index[k * kGroup + j] = Grid::index(l);
                xl += ws[j] * xs[j] * sl;
                ll += ws[j] * sl * sl;
            }
        }
        if (ll > 0) d = xl / ll;
    }
    return out;
}

// x ≈ (d · scale) · l - (dmin · min), a scale and a min 0 … kScaleMost for each kGroup weights, l = 0 … kMost.
template <int kGroup>
struct Lines {
    static constexpr int kGroups = kSuperBlock / kGroup;
    uint16_t d, dmin;  // halves
    int scale[kGroups], min[kGroups];
    int index[kSuperBlock];
};

template <int kMost, int kGroup, int kScaleMost>
Lines<kGroup> fit_lines(const float* x, const float* w) {
    constexpr int kGroups = kSuperBlock / kGroup;
    Lines<kGroup> out{};
    const float size = std::abs(extreme(x, kSuperBlock));
    float unit[kSuperBlock], d = 0, dmin = 0;
    Line line[kGroups];
    for (int i = 0; i < kSuperBlock; i++) unit[i] = x[i] * reciprocal(size);
    for (int k = 0; k < kGroups; k++) {
        line[k] = best_line<kMost, true>(unit + k * kGroup, w + k * kGroup, kGroup);
        d = std::max(d, line[k].d / kScaleMost), dmin = std::max(dmin, line[k].m / kScaleMost);
    }
    const auto whole = [](float x) { return static_cast<int>(std::lround(std::clamp<float>(x, 0, kScaleMost))); };
    for (int round = 0; round < kRounds; round++) {
        out.d = scale_to_half(size * d, size), out.dmin = scale_to_half(size * dmin, size);
        d = half_to_float(out.d) * reciprocal(size), dmin = half_to_float(out.dmin) * reciprocal(size);
        // Sums of w times the products of x, a = scale · l and b = min.
        float aa = 0, ab = 0, bb = 0, xa = 0, xb = 0;
        for (int k = 0; k < kGroups; k++) {
            const float *const xs = unit + k * kGroup, *const ws = w + k * kGroup;
            const int first_scale = std::clamp(whole(line[k].d * reciprocal(d)) - 2, 0, kScaleMost - 3);
            const int first_min = std::clamp(whole(line[k].m * reciprocal(dmin)) - 2, 0, kScaleMost - 3);
            Lanes steps{}, mins{};
            for (int c = 0; c < kLanes; c++) {
                steps[c] = d * (first_scale + c / 4), mins[c] = dmin * (first_min + c % 4);
            }
            const int best = best_of_lines<kMost>(xs, ws, kGroup, steps, mins);
            out.scale[k] = first_scale + best / 4, out.min[k] = first_min + best % 4;
            line[k] = {steps[best], mins[best]};
            const float inverse = reciprocal(steps[best]), b = out.min[k];
            for (int j = 0; j < kGroup; j++) {
                const float l = Whole<0, kMost>::nearest((xs[j] + mins[best]) * inverse), a = out.scale[k] * l;
                out.index[k * kGroup + j] = static_cast<int>(l);
                aa += ws[j] * a * a, ab += ws[j] * a * b, bb += ws[j] * b * b;
                xa += ws[j] * xs[j] * a, xb += ws[j] * xs[j] * b;
            }
        }
        const float determinant = aa * bb - ab * ab;
        if (determinant > 0 && ab * xa > aa * xb) {
            d = (bb * xa - ab * xb) / determinant, dmin = (ab * xa - aa * xb) / determinant;
        } else if (aa > 0) {
            d = xa / aa, dmin = 0;
        }
    }
    return out;
}

// Low and high halves of bytes, for each 64 weights: as Q4_K and Q5_K have them.
inline void pack_nibbles_64(const int* q, uint8_t* qs) {
    for (int i = 0; i < 128; i++) {
        const int at = i / 32 * 64 + i % 32;
        qs[i] = static_cast<uint8_t>((q[at] & 15) | (q[at + 32] & 15) << 4);
    }
}

// The inverse of q4_k_scale() and q4_k_min().
inline void pack_q4_k_scales(const int* scale, const int* min, uint8_t* scales) {
    for (int k = 0; k < 4; k++) {
        scales[k] = static_cast<uint8_t>(scale[k] | (scale[k + 4] >> 4) << 6);
        scales[k + 4] = static_cast<uint8_t>(min[k] | (min[k + 4] >> 4) << 6);
        scales[k + 8] = static_cast<uint8_t>((scale[k + 4] & 15) | (min[k + 4] & 15) << 4);
    }
}

inline void encode(const float* x, const float* w, BlockQ2_K& b) {
    const auto fit = fit_lines<3, 16, 15>(x, w);
    b.d = fit.d, b.dmin = fit.dmin;
    for (int k = 0; k < 16; k++) b.scales[k] = static_cast<uint8_t>(fit.scale[k] | fit.min[k] << 4);
    for (int i = 0; i < 64; i++) {
        const int* q = fit.index + i / 32 * 128 + i % 32;
        b.qs[i] = static_cast<uint8_t>(q[0] | q[32] << 2 | q[64] << 4 | q[96] << 6);
    }
}

inline void encode(const float* x, const float* w, BlockQ4_K& b) {
    const auto fit = fit_lines<15, 32, 63>(x, w);
    b.d = fit.d, b.dmin = fit.dmin;
    pack_q4_k_scales(fit.scale, fit.min, b.scales);
    pack_nibbles_64(fit.index, b.qs);
}

inline void encode(const float* x, const float* w, BlockQ5_K& b) {
    const auto fit = fit_lines<31, 32, 63>(x, w);
    b.d = fit.d, b.dmin = fit.dmin;
    pack_q4_k_scales(fit.scale, fit.min, b.scales);
    pack_nibbles_64(fit.index, b.qs);
    for (int j = 0; j < 32; j++) {
        b.qh[j] = 0;
        for (int k = 0; k < 8; k++) b.qh[j] |= static_cast<uint8_t>(fit.index[32 * k + j] >> 4 << k);
    }
}

inline void encode(const float* x, const float* w, BlockQ3_K& b) {
    const auto fit = fit_steps<Whole<-4, 3>, 16, -32, 31>(x, w, 1.5f);
    b = {};
    b.d = fit.d;
    for (int k = 0; k < 16; k++) {
        const int scale = fit.scale[k] + 32;
        b.scales[k % 8] |= static_cast<uint8_t>((scale & 15) << 4 * (k / 8));
        b.scales[8 + k % 4] |= static_cast<uint8_t>(scale >> 4 << 2 * (k / 4));
    }
    for (int i = 0; i < kSuperBlock; i++) {
        const int q = fit.index[i];
        b.qs[i / 128 * 32 + i % 32] |= static_cast<uint8_t>((q & 3) << 2 * (i / 32 % 4));
        b.hmask[i % 32] |= static_cast<uint8_t>(q >> 2 << i / 32);
    }
}

inline void encode(const float* x, const float* w, BlockQ6_K& b) {
    const auto fit = fit_steps<Whole<-32, 31>, 16, -128, 127>(x, w, 1.1f);
    b = {};
    b.d = fit.d;
    for (int k = 0; k < 16; k++) b.scales[k] = static_cast<int8_t>(fit.scale[k]);
    for (int i = 0; i < kSuperBlock; i++) {
        const int q = fit.index[i], half = i / 128, j = i % 128;
        b.ql[64 * half + j % 64] |= static_cast<uint8_t>((q & 15) << 4 * (j / 64));
        b.qh[32 * half + j % 32] |= static_cast<uint8_t>(q >> 4 << 2 * (j / 32));
    }
}

inline void encode(const float* x, const float* w, BlockIQ4_XS& b) {
    const auto fit = fit_steps<Iq4, 32, -32, 31>(x, w, 1.5f);
    b = {};
    b.d = fit.d;
    for (int k = 0; k < 8; k++) {
        const int scale = fit.scale[k] + 32;
        b.scales_l[k / 2] |= static_cast<uint8_t>((scale & 15) << 4 * (k % 2));
        b.scales_h = static_cast<uint16_t>(b.scales_h | scale >> 4 << 2 * k);
        for (int j = 0; j < 16; j++) {
            const int* q = fit.index + 32 * k + j;
            b.qs[16 * k + j] = static_cast<uint8_t>(q[0] | q[16] << 4);
        }
    }
}

}  // namespace gemmart
