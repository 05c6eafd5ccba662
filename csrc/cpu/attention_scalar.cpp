// Storing keys and values, and attention over pages, in plain C++: the truth that every other ISA is compared with.
#include <cmath>
#include <cstring>

#include "cpu/convert.h"
#include "cpu/tables.h"
#include "formats/common.h"

namespace gemmart::cpu {
namespace {

void put(KvType type, std::byte* base, int index, float value) {
    switch (type) {
        case KvType::F32:
            std::memcpy(base + 4 * index, &value, 4);
            break;
        case KvType::F16: {
            const uint16_t bits = float_to_half(value);
            std::memcpy(base + 2 * index, &bits, 2);
            break;
        }
        case KvType::BF16: {
            const uint16_t bits = float_to_bfloat16(value);
            std::memcpy(base + 2 * index, &bits, 2);
            break;
        }
        case KvType::Q8_0:
            reinterpret_cast<int8_t*>(base)[index] = static_cast<int8_t>(std::nearbyint(value));
            break;
    }
}

float get(KvType type, const std::byte* base, int index) {
    uint16_t bits;
    float value;
    switch (type) {
        case KvType::F32:
            std::memcpy(&value, base + 4 * index, 4);
            return value;
        case KvType::F16:
            std::memcpy(&bits, base + 2 * index, 2);
            return half_to_float(bits);
        case KvType::BF16:
            std::memcpy(&bits, base + 2 * index, 2);
            return bfloat16_to_float(bits);
        case KvType::Q8_0:
            return reinterpret_cast<const int8_t*>(base)[index];
    }
    return 0;
}

void store_kv_scalar(KvType type, const KvHeadLayout& layout, int head_dim, const float* key, const float* value,
                     int slot, std::byte* part) {
    for (int d0 = 0; d0 < head_dim; d0 += 32) {
        const int n = head_dim - d0 < 32 ? head_dim - d0 : 32;
        float inverse[2] = {1, 1};
        bool zero[2] = {false, false};  // a scale that is not a normal number: NaN and infinity show in every product
        if (type == KvType::Q8_0)
            for (int which = 0; which < 2; ++which) {
                const float* x = (which ? value : key) + d0;
                float max = 0;
                for (int i = 0; i < n; ++i)
                    if (std::isnan(x[i]) || std::fabs(x[i]) > max) max = std::fabs(x[i]);  // a NaN stays
                const float scale = max / 127;
                zero[which] = !std::isnormal(scale);
                inverse[which] = 127 / max;
                const int at = which ? slot * (head_dim / 32) + d0 / 32 : d0 / 32 * kPageTokens + slot;
                std::memcpy(part + (which ? layout.value_scales : layout.key_scales) + 4 * at, &scale, 4);
            }
        for (int i = d0; i < d0 + n; ++i) {
            put(type, part + layout.keys, i * kPageTokens + slot, zero[0] ? 0 : key[i] * inverse[0]);
            put(type, part + layout.values, slot * head_dim + i, zero[1] ? 0 : value[i] * inverse[1]);
        }
    }
}

float scale_at(const std::byte* base, int index) {
    float value;
    std::memcpy(&value, base + 4 * index, 4);
    return value;
}

void attention_scalar(const AttentionJob& job, std::byte*) {
    const int head_dim = job.head_dim;
    const bool scaled = job.type == KvType::Q8_0;
    for (int r = 0; r < job.n_rows; ++r) {
        const int last = job.positions[r];
        const int first = job.window && last >= job.window ? last - job.window + 1 : 0;
        const float* query = job.queries[r];
        float* out = job.outputs[r];
        float max = -INFINITY, total = 0;
        for (int i = 0; i < head_dim; ++i) out[i] = 0;
        for (int page = first / kPageTokens; page <= last / kPageTokens; ++page) {
            const std::byte* part = job.pages[page];
            const int begin = page * kPageTokens < first ? first - page * kPageTokens : 0;
            const int end = (page + 1) * kPageTokens > last + 1 ? last + 1 - page * kPageTokens : kPageTokens;
            float score[kPageTokens];
            float page_max = max;
            for (int slot = begin; slot < end; ++slot) {
                float sum = 0;
                for (int i = 0; i < head_dim; ++i) {
                    float key = get(job.type, part + job.layout.keys, i * kPageTokens + slot);
                    if (scaled) key *= scale_at(part + job.layout.key_scales, i / 32 * kPageTokens + slot);
                    sum += query[i] * key;
                }
                score[slot] = job.softcap ? job.softcap * std::tanh(sum / job.softcap) : sum;
                page_max = !(score[slot] <= page_max) ? score[slot] : page_max;
            }
            const float shrink = std::exp(max - page_max);
            for (int i = 0; i < head_dim; ++i) out[i] *= shrink;
            total *= shrink;
            max = page_max;
            for (int slot = begin; slot < end; ++slot) {
                const float p = std::exp(score[slot] - max);
                total += p;
                for (int i = 0; i < head_dim; ++i) {
                    float value = get(job.type, part + job.layout.values, slot * head_dim + i);
                    if (scaled) value *= scale_at(part + job.layout.value_scales, slot * (head_dim / 32) + i / 32);
                    out[i] += p * value;
                }
            }
        }
        for (int i = 0; i < head_dim; ++i) out[i] /= total;
    }
}

}  // namespace

void fill_attention_scalar(Kernels& k) {
    k.store_kv = store_kv_scalar;
    k.attention = attention_scalar;
}

}  // namespace gemmart::cpu
