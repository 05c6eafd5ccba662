// Searches for the scales of a group of weights: many candidates are tried at once, a vector lane each, so that nothing
// is summed across lanes and the result is the same whatever the vectors are.
//
// x are weights, w what the square of an error in each counts (> 0), l the level that a weight is rounded to.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>

#include "cpu/convert.h"
#include "formats/iq4_nl.h"

namespace gemmart {

// A vector of the instruction set that this is compiled for; candidates are tried kLanes at a time, in as many vectors.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kVectorBytes), may_alias));
constexpr int kLanes = 16, kVectorLanes = kVectorBytes / 4;

struct alignas(kVectorBytes) Lanes {
    float lane[kLanes];
    float& operator[](int i) { return lane[i]; }
    float operator[](int i) const { return lane[i]; }
    Vector& at(int i) { return *reinterpret_cast<Vector*>(lane + i); }
    const Vector& at(int i) const { return *reinterpret_cast<const Vector*>(lane + i); }
};

// Weights whose greatest is less than this times the block's greatest are zero: no format resolves them.
constexpr float kNegligible = 1e-7f;

// Whole levels kLo … kHi.
template <int kLo, int kHi>
struct Whole {
    static constexpr int kMost = kHi > -kLo ? kHi : -kLo;  // greatest magnitude
    static constexpr bool kSymmetric = kHi == -kLo;
    template <typename T>
    static T nearest(T t) {
        constexpr float kToInteger = 12582912.f;  // 1.5 · 2^23: adding it leaves no bits after the point
        const T lo = T{} + static_cast<float>(kLo), hi = T{} + static_cast<float>(kHi);
        t = t < lo ? lo : t;
        t = t > hi ? hi : t;
        return (t + kToInteger) - kToInteger;
    }
    static int index(float level) { return static_cast<int>(level) - kLo; }
};

// The 16 levels of IQ4_NL and IQ4_XS.
struct Iq4 {
    static constexpr int kMost = 127;
    static constexpr bool kSymmetric = false;
    template <typename T>
    static T nearest(T t) {
        T level = T{} + static_cast<float>(kIQ4Levels[0]);
        for (int i = 1; i < 16; i++) {
            const T middle = T{} + 0.5f * (kIQ4Levels[i - 1] + kIQ4Levels[i]);
            level = t > middle ? T{} + static_cast<float>(kIQ4Levels[i]) : level;
        }
        return level;
    }
    static int index(float level) {
        return static_cast<int>(std::find(kIQ4Levels, kIQ4Levels + 16, static_cast<int8_t>(level)) - kIQ4Levels);
    }
};

// A scale as a half, of a block whose greatest weight is `size`: one that would be rounded to 0 is the least half that
// is not, if that is less than the weights.
inline uint16_t scale_to_half(float scale, float size) {
    const uint16_t half = cpu::float_to_half(scale);
    return (half & 0x7fff) == 0 && scale != 0 && size > 0x1p-24f ? half | 1 : half;
}

// 0 for what is too small to have one.
inline float reciprocal(float x) { return std::abs(x) < 0x1p-125f ? 0 : 1 / x; }

static inline Vector reciprocal(Vector x) {
    const Vector size = x < 0 ? -x : x;
    return size < 0x1p-125f ? Vector{} : 1 / x;
}

inline int least_lane(const Lanes& values) {
    int least = 0;
    for (int c = 1; c < kLanes; c++) least = values[c] < values[least] ? c : least;
    return least;
}

// The element of greatest magnitude.
inline float extreme(const float* x, int n) {
    return *std::max_element(x, x + n, [](float a, float b) { return std::abs(a) < std::abs(b); });
}

// ---- x ≈ d · l

// The step d, of either sign, for which Σ w (x - d l)² is least; 0 for weights that are negligible beside 1.
// The steps that are tried are `least` to `most` times finer than what takes in the extreme weight.
template <typename Grid>
float best_step(const float* x, const float* w, int n, float least, float most) {
    const float top = extreme(x, n);
    if (std::abs(top) < kNegligible) return 0;
    float xx = 0;
    for (int j = 0; j < n; j++) xx += w[j] * x[j] * x[j];
    Lanes inverse{};
    float step = 0;
    // With t = x · inverse and the rounding error e = l - t, the best step for these levels is Σ w t (t + e) / Σ w l²
    // over inverse, and its loss (Σ w x² Σ w e² - (Σ w x e)²) / Σ w l²: no difference of what is nearly the same where
    // one weight is much greater than the others.
    const auto try_all = [&] {
        Lanes steps, losses;
        for (int c = 0; c < kLanes; c += kVectorLanes) {
            const Vector inv = inverse.at(c);
            Vector xe{}, ee{};
            for (int j = 0; j < n; j++) {
                const Vector t = x[j] * inv, e = Grid::nearest(t) - t, we = w[j] * e;
                xe += we * x[j];
                ee += we * e;
            }
            const Vector ll = inv * inv * xx + 2 * inv * xe + ee;
            steps.at(c) = (inv * xx + xe) / ll;
            losses.at(c) = (xx * ee - xe * xe) / ll;
        }
        const int best = least_lane(losses);
        step = steps[best];
        return inverse[best];
    };
    constexpr int kOneSign = Grid::kSymmetric ? kLanes : kLanes / 2;  // steps of the other one find nothing else
    const float between = (most - least) / (kOneSign - 1);
    for (int c = 0; c < kLanes; c++) {
        const float finer = least + c % kOneSign * between;
        inverse[c] = (c < kOneSign ? finer : -finer) * Grid::kMost / top;
    }
    const float coarse = try_all();
    for (int c = 0; c < kLanes; c++) inverse[c] = coarse * (1 + between * (c - kLanes / 2 + 0.5f) / (kLanes / 2));
    try_all();
    return step;
}

// Of kLanes steps the one for which Σ w (x - d l)² is least.
template <typename Grid>
int best_of_steps(const float* x, const float* w, int n, const Lanes& d) {
    Lanes losses;
    for (int c = 0; c < kLanes; c += kVectorLanes) {
        const Vector step = d.at(c), inverse = reciprocal(step);
        Vector loss{};
        for (int j = 0; j < n; j++) {
            const Vector e = x[j] - step * Grid::nearest(x[j] * inverse);
            loss += w[j] * e * e;
        }
        losses.at(c) = loss;
    }
    return least_lane(losses);
}

// ---- x ≈ d · l - m, l = 0 … kMost

struct Line {
    float d, m;
};

// The line for which Σ w (x - d l + m)² is least. kPositive: m >= 0.
template <int kMost, bool kPositive>
Line best_line(const float* x, const float* w, int n) {
    using Grid = Whole<0, kMost>;
    const auto [low, high] = std::minmax_element(x, x + n);
    const float lo = kPositive ? std::min(*low, 0.f) : *low, hi = *high;
    if (hi - lo < kNegligible) return {0, -lo};
    float sw = 0, sx = 0;
    for (int j = 0; j < n; j++) sw += w[j], sx += w[j] * x[j];
    Lanes d{}, m{};
    Line best{(hi - lo) / kMost, -lo};
    float least = 0;
    const auto try_all = [&] {
        Lanes sls, lls, xls;
        for (int c = 0; c < kLanes; c += kVectorLanes) {
            const Vector min = m.at(c), inverse = reciprocal(d.at(c));
            Vector sl{}, ll{}, xl{};
            for (int j = 0; j < n; j++) {
                const Vector l = Grid::nearest((x[j] + min) * inverse), wl = w[j] * l;
                sl += wl;
                ll += wl * l;
                xl += wl * x[j];
            }
            sls.at(c) = sl, lls.at(c) = ll, xls.at(c) = xl;
        }
        for (int c = 0; c < kLanes; c++) {
            const float sl = sls[c], ll = lls[c], xl = xls[c], determinant = sw * ll - sl * sl;
            if (!(determinant > 0)) continue;
            Line line{(sw * xl - sx * sl) / determinant, (sl * xl - ll * sx) / determinant};
            if (kPositive && line.m < 0) line = {xl / ll, 0};
            const float loss = line.m * sx - line.d * xl;  // but for Σ w x²
            if (loss < least) least = loss, best = line;
        }
    };
    // Coarser or finer steps, with more or less of the weights below the line's end.
    constexpr float kStep[4] = {0.7f, 0.8f, 0.9f, 1.f}, kEnd[4] = {0.f, 0.33f, 0.67f, 1.f};
    for (int c = 0; c < kLanes; c++) {
        const float step = kStep[c / 4], spare = (1 - step) * (hi - lo);
        d[c] = step * (hi - lo) / kMost;
        m[c] = -(lo + kEnd[c % 4] * spare);
        if (kPositive) m[c] = std::max(m[c], 0.f);
    }
    try_all();
    for (float width : {0.06f, 0.03f}) {
        const Line center = best;
        for (int c = 0; c < kLanes; c++) {
            d[c] = center.d * (1 + width * (c / 4 - 1.5f));
            m[c] = center.m + center.d * (c % 4 - 1.5f) * 0.3f;
            if (kPositive) m[c] = std::max(m[c], 0.f);
        }
        try_all();
    }
    return best;
}

// Of kLanes lines the one for which Σ w (x - d l + m)² is least.
template <int kMost>
int best_of_lines(const float* x, const float* w, int n, const Lanes& d, const Lanes& m) {
    Lanes losses;
    for (int c = 0; c < kLanes; c += kVectorLanes) {
        const Vector step = d.at(c), min = m.at(c), inverse = reciprocal(step);
        Vector loss{};
        for (int j = 0; j < n; j++) {
            const Vector from_min = x[j] + min, e = from_min - step * Whole<0, kMost>::nearest(from_min * inverse);
            loss += w[j] * e * e;
        }
        losses.at(c) = loss;
    }
    return least_lane(losses);
}

}  // namespace gemmart
