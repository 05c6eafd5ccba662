#include "kv_layout.h"

#include "error.h"

namespace gemmart {

KvType kv_type_of(std::string_view name) {
    if (name == "f32") return KvType::F32;
    if (name == "f16") return KvType::F16;
    if (name == "bf16") return KvType::BF16;
    if (name == "q8_0") return KvType::Q8_0;
    throw std::invalid_argument(message("KV type '", name, "' is unknown; use f32, f16, bf16 or q8_0"));
}

KvHeadLayout kv_head_layout(KvType type, int head_dim) {
    bool q8 = type == KvType::Q8_0;
    check<std::invalid_argument>(head_dim > 0 && (!q8 || head_dim % 32 == 0), "head_dim is ", head_dim,
                                 q8 ? ", a q8_0 KV cache needs a multiple of 32" : ", expected at least 1");
    const size_t element = q8 ? 1 : type == KvType::F32 ? 4 : 2;
    const size_t n_blocks = (static_cast<size_t>(head_dim) + 31) / 32;
    const size_t keys = head_dim * kPageTokens * element, values = n_blocks * 32 * kPageTokens * element;
    const size_t scales = q8 ? n_blocks * kPageTokens * sizeof(float) : 0;
    return {0, keys, keys + scales, keys + scales + values, keys + values + 2 * scales};
}

}  // namespace gemmart
