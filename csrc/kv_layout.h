// How keys and values lie in pages, on the CPU and on GPUs.
#pragma once

#include <cstddef>
#include <string_view>

namespace gemmart {

inline constexpr int kPageTokens = 32;

enum class KvType { F32, F16, BF16, Q8_0 };
KvType kv_type_of(std::string_view name);  // "f32", "f16", "bf16", "q8_0"; otherwise throws std::invalid_argument

// One layer's part of a page, for each of its kv heads in turn: keys, then values, both in rows of 32 neighbours that a
// product reads together.
//   keys    [head_dim][kPageTokens]             a row holds one component of all positions
//   values  [blocks of 32][kPageTokens][32]     a row holds 32 components of one position; the last block may be partly
//                                               unused
// Q8_0: int8 numbers, keys [head_dim / 4][kPageTokens][4], so that an integer dot product finds four components of a
// position in 32 bits. After each matrix its float32 scales, one for 32 components: [head_dim / 32][kPageTokens];
// head_dim a multiple of 32.
struct KvHeadLayout {
    size_t keys, key_scales, values, value_scales;  // byte offsets inside the head's part; scales only for Q8_0
    size_t n_bytes;                                 // of the head's part, a multiple of 64
};
KvHeadLayout kv_head_layout(KvType type, int head_dim);

enum Group { Global = 0, Windowed = 1 };

}  // namespace gemmart
