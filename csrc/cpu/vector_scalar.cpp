// Element-wise kernels in plain C++: the truth that every other ISA is compared with.
#include <cmath>
#include <cstring>

#include "cpu/tables.h"

namespace gemmart::cpu {
namespace {

void quantize_scalar(const float* const* x, int n, int w, int n_cols, const ActivationArrays& to) {
    for (int g = 0; g < n_cols / kGroup; ++g)
        for (int c = 0; c < n; ++c) {
            const float* block = x[c] + g * kGroup;
            uint32_t largest = 0;  // of the bits without sign: NaN > infinity > all finite numbers
            for (int i = 0; i < kGroup; ++i) {
                uint32_t bits;
                std::memcpy(&bits, block + i, 4);
                bits &= 0x7fffffff;
                if (bits > largest) largest = bits;
            }
            float max;
            std::memcpy(&max, &largest, 4);
            const float coarse = activation_scale(max / 127), scale = to.q_low ? coarse / 256 : coarse;
            const bool normal = std::isnormal(scale) && std::isnormal(coarse);
            const float inverse = normal ? 1 / coarse : 0;
            int sum[2] = {0, 0};
            for (int i = 0; i < kGroup; ++i) {
                const int at = (g * w + c) * kGroup + i;
                int value = normal ? static_cast<int>(std::nearbyint(block[i] * inverse)) : 0;
                to.q[at] = static_cast<int8_t>(value);
                if (to.q_low) {
                    const float rest = normal ? std::fma(-coarse, static_cast<float>(value), block[i]) : 0;
                    const float low = std::nearbyint(rest * (256 * inverse));
                    to.q_low[at] = static_cast<int8_t>(low > 127 ? 127 : low < -127 ? -127 : low);
                    value = 256 * value + to.q_low[at];
                }
                sum[i / 16] += value;
            }
            put_sums(to, g, w, c, scale, sum[0], sum[1]);
        }
}

void interleave_scalar(const float* const* x, int w, int n_cols, float* out) {
    for (int k = 0; k < n_cols; ++k)
        for (int c = 0; c < w; ++c) out[k * w + c] = x[c][k];
}

void rms_norm_scalar(const float* x, const float* weight, int n, float eps, float* out) {
    float lanes[16] = {};
    for (int i = 0; i < n; ++i) lanes[i % 16] += x[i] * x[i];
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    const float scale = 1 / std::sqrt(lanes[0] / n + eps);
    for (int i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

void add_scalar(float* x, const float* y, int n) {
    for (int i = 0; i < n; ++i) x[i] += y[i];
}

void scale_scalar(float* x, float s, int n) {
    for (int i = 0; i < n; ++i) x[i] *= s;
}

void gate_scalar(Activation act, const float* gate, const float* up, int n, float* out) {
    constexpr float kRoot = 0.7978845608028654f;  // sqrt(2 / pi)
    for (int i = 0; i < n; ++i) {
        const float x = gate[i];
        // x / 2 · (1 + tanh(u)) = x / (1 + exp(-2 u)): no cancellation
        const float u = act == Activation::Gelu ? 2 * kRoot * (x + 0.044715f * x * x * x) : x;
        out[i] = x / (1 + std::exp(-u)) * up[i];
    }
}

void softcap_scalar(float* x, int n, float cap) {
    for (int i = 0; i < n; ++i) x[i] = cap * std::tanh(x[i] / cap);
}

bool all_finite_scalar(const float* x, int n) {
    float sum = 0;  // x · 0 is 0, or NaN for a NaN or an infinity
    for (int i = 0; i < n; ++i) sum += x[i] * 0.f;
    return sum == 0;
}

int find_above_scalar(const float* x, int begin, int n, float limit) {
    while (begin < n && !(x[begin] > limit)) ++begin;
    return begin;
}

double sum_exp_scalar(const float* x, int n, float from) {
    double sum = 0;
    for (int i = 0; i < n; ++i) sum += std::exp(x[i] - from);
    return sum;
}

void rope_scalar(float* x, const float* cosines, const float* sines, int head_dim, bool neox) {
    const int half = head_dim / 2;
    for (int i = 0; i < half; ++i) {
        float& a = x[neox ? i : 2 * i];
        float& b = x[neox ? i + half : 2 * i + 1];
        const float rotated = a * cosines[i] - b * sines[i];
        b = a * sines[i] + b * cosines[i];
        a = rotated;
    }
}

}  // namespace

void fill_vector_scalar(Kernels& k) {
    k.quantize = quantize_scalar;
    k.interleave = interleave_scalar;
    k.rms_norm = rms_norm_scalar;
    k.add = add_scalar;
    k.scale = scale_scalar;
    k.gate = gate_scalar;
    k.softcap = softcap_scalar;
    k.all_finite = all_finite_scalar;
    k.find_above = find_above_scalar;
    k.sum_exp = sum_exp_scalar;
    k.rope = rope_scalar;
}

}  // namespace gemmart::cpu
