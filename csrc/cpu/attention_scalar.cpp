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

int key_index(KvType type, int component, int slot) {
    return type == KvType::Q8_0 ? (component / 4 * kPageTokens + slot) * 4 + component % 4
                                : component * kPageTokens + slot;
}

int value_index(int component, int slot) { return (component / 32 * kPageTokens + slot) * 32 + component % 32; }

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
                const int at = d0 / 32 * kPageTokens + slot;
                std::memcpy(part + (which ? layout.value_scales : layout.key_scales) + 4 * at, &scale, 4);
            }
        for (int i = d0; i < d0 + n; ++i) {
            put(type, part + layout.keys, key_index(type, i, slot), zero[0] ? 0 : key[i] * inverse[0]);
            put(type, part + layout.values, value_index(i, slot), zero[1] ? 0 : value[i] * inverse[1]);
        }
    }
}

float scale_at(const std::byte* base, int index) {
    float value;
    std::memcpy(&value, base + 4 * index, 4);
    return value;
}

// A sum of values whose weights are relative to `max`.
struct Sum {
    float* values;  // [head_dim]
    float max = 0, total = 0;
};

void add(const float* values, float max, float total, int head_dim, Sum& to) {
    if (total == 0) return;  // nothing seen
    const bool is_first = to.total == 0;
    const float new_max = is_first || max > to.max ? max : to.max;
    const float before = is_first ? 0 : std::exp(to.max - new_max), added = std::exp(max - new_max);
    for (int i = 0; i < head_dim; ++i) to.values[i] = (is_first ? 0 : to.values[i] * before) + values[i] * added;
    to.total = to.total * before + total * added;
    to.max = new_max;
}

// Positions [begin, end), all of one range.
void attend_range(const AttentionJob& job, const float* query, int begin, int end, Sum& sum) {
    const int head_dim = job.head_dim;
    const bool scaled = job.type == KvType::Q8_0;
    float score[kRange];
    sum.max = -INFINITY, sum.total = 0;
    for (int p = begin; p < end; ++p) {
        const std::byte* part = job.pages[p / kPageTokens];
        const int slot = p % kPageTokens;
        float product = 0;
        for (int i = 0; i < head_dim; ++i) {
            float key = get(job.type, part + job.layout.keys, key_index(job.type, i, slot));
            if (scaled) key *= scale_at(part + job.layout.key_scales, i / 32 * kPageTokens + slot);
            product += query[i] * key;
        }
        score[p - begin] = job.softcap ? job.softcap * std::tanh(product / job.softcap) : product;
        sum.max = score[p - begin] <= sum.max ? sum.max : score[p - begin];
    }
    for (int i = 0; i < head_dim; ++i) sum.values[i] = 0;
    for (int p = begin; p < end; ++p) {
        const std::byte* part = job.pages[p / kPageTokens];
        const int slot = p % kPageTokens;
        const float weight = std::exp(score[p - begin] - sum.max);
        sum.total += weight;
        for (int i = 0; i < head_dim; ++i) {
            float value = get(job.type, part + job.layout.values, value_index(i, slot));
            if (scaled) value *= scale_at(part + job.layout.value_scales, i / 32 * kPageTokens + slot);
            sum.values[i] += weight * value;
        }
    }
}

void attention_scalar(const AttentionJob& job, std::byte* scratch) {
    const int n_values = partial_size(job.head_dim) - 16;
    for (int r = 0; r < job.n_rows; ++r) {
        const int last = job.positions[r], first = job.window && last >= job.window ? last - job.window + 1 : 0;
        Sum of_range{reinterpret_cast<float*>(scratch)}, all{job.partials + r * job.ld_partials};
        std::memset(all.values, 0, n_values * sizeof(float));
        for (int range = job.range_begin; range < job.range_end; ++range) {
            const int begin = first > range * kRange ? first : range * kRange;
            const int end = last < (range + 1) * kRange ? last + 1 : (range + 1) * kRange;
            if (begin >= end) continue;
            attend_range(job, job.queries[r], begin, end, of_range);
            add(of_range.values, of_range.max, of_range.total, job.head_dim, all);
        }
        all.values[n_values] = all.max;
        all.values[n_values + 1] = all.total;
    }
}

void merge_scalar(const float* partials, int n, int head_dim, float* out) {
    const int size = partial_size(head_dim);
    Sum all{out};
    for (int i = 0; i < n; ++i) {
        const float* from = partials + static_cast<size_t>(i) * size;
        add(from, from[size - 16], from[size - 15], head_dim, all);
    }
    for (int i = 0; i < head_dim; ++i) out[i] /= all.total;
}

}  // namespace

void fill_attention_scalar(Kernels& k) {
    k.store_kv = store_kv_scalar;
    k.attention = attention_scalar;
    k.merge = merge_scalar;
}

}  // namespace gemmart::cpu
