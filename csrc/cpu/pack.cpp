// From rows as in the file to panels of 16 rows (layout.h): a permutation of 4-byte words, scales and high bits.
#include <cstring>

#include "cpu/kernels.h"
#include "formats/q4_0.h"
#include "formats/q4_1.h"
#include "formats/q4_k.h"
#include "formats/q5_0.h"
#include "formats/q5_k.h"
#include "formats/q6_k.h"
#include "formats/q8_0.h"

namespace gemmart::cpu {
namespace {

// dst [n_words][16] words <- 16 rows of n_words
template <typename Word>
void transpose(const std::byte* const* rows, size_t offset, int n_words, std::byte* dst) {
    for (int i = 0; i < n_words; ++i)
        for (int r = 0; r < kPanel; ++r)
            std::memcpy(dst + (i * kPanel + r) * sizeof(Word), rows[r] + offset + i * sizeof(Word), sizeof(Word));
}

// out [8] masks: bit 4r + b of out[s] is bit `shift + stride · (4s + b)` … of the row, given as a function of (row,
// column)
template <typename Bit>
void gather_bits(Bit bit, std::byte* dst) {
    for (int s = 0; s < 8; ++s) {
        uint64_t mask = 0;
        for (int r = 0; r < kPanel; ++r)
            for (int b = 0; b < 4; ++b) mask |= static_cast<uint64_t>(bit(r, 4 * s + b)) << (4 * r + b);
        std::memcpy(dst + 8 * s, &mask, 8);
    }
}

void pack_q4_0(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockQ4_0, d), 1, dst);
    transpose<uint32_t>(rows, offsetof(BlockQ4_0, qs), 4, dst + 32);
}

void pack_q4_1(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockQ4_1, d), 1, dst);
    transpose<uint16_t>(rows, offsetof(BlockQ4_1, m), 1, dst + 32);
    transpose<uint32_t>(rows, offsetof(BlockQ4_1, qs), 4, dst + 64);
}

void pack_q5_0(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockQ5_0, d), 1, dst);
    uint32_t high[kPanel];
    for (int r = 0; r < kPanel; ++r) std::memcpy(&high[r], rows[r] + offsetof(BlockQ5_0, qh), 4);
    gather_bits([&](int r, int column) { return (high[r] >> column) & 1; }, dst + 32);
    transpose<uint32_t>(rows, offsetof(BlockQ5_0, qs), 4, dst + 96);
}

void pack_q8_0(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockQ8_0, d), 1, dst);
    transpose<uint32_t>(rows, offsetof(BlockQ8_0, qs), 8, dst + 32);
}

// d, dmin and the 6-bit scales and minimums that Q4_K and Q5_K share: 256 bytes
void pack_k_scales(const std::byte* const* rows, size_t d, size_t dmin, size_t scales, std::byte* dst) {
    transpose<uint16_t>(rows, d, 1, dst);
    transpose<uint16_t>(rows, dmin, 1, dst + 32);
    uint8_t* lo[2] = {reinterpret_cast<uint8_t*>(dst + 64), reinterpret_cast<uint8_t*>(dst + 128)};
    uint8_t* hi[2] = {reinterpret_cast<uint8_t*>(dst + 192), reinterpret_cast<uint8_t*>(dst + 224)};
    std::memset(dst + 64, 0, 192);
    for (int r = 0; r < kPanel; ++r) {
        const auto* s = reinterpret_cast<const uint8_t*>(rows[r] + scales);
        for (int g = 0; g < 8; ++g) {
            // ggml's order: groups 0-3 in the low six bits of bytes 0-3 and 4-7; groups 4-7 in the nibbles of bytes
            // 8-11 and the top two bits
            const uint8_t six[2] = {
                static_cast<uint8_t>(g < 4 ? s[g] & 63 : (s[g + 4] & 15) | (s[g - 4] >> 6) << 4),
                static_cast<uint8_t>(g < 4 ? s[g + 4] & 63 : (s[g + 4] >> 4) | (s[g] >> 6) << 4),
            };
            for (int which = 0; which < 2; ++which) {
                lo[which][g / 2 * kPanel + r] |= (six[which] & 15) << 4 * (g & 1);
                hi[which][g / 4 * kPanel + r] |= (six[which] >> 4) << 2 * (g % 4);
            }
        }
    }
}

void pack_q4_k(const std::byte* const* rows, std::byte* dst) {
    pack_k_scales(rows, offsetof(BlockQ4_K, d), offsetof(BlockQ4_K, dmin), offsetof(BlockQ4_K, scales), dst);
    transpose<uint32_t>(rows, offsetof(BlockQ4_K, qs), 32, dst + 256);
}

void pack_q5_k(const std::byte* const* rows, std::byte* dst) {
    pack_k_scales(rows, offsetof(BlockQ5_K, d), offsetof(BlockQ5_K, dmin), offsetof(BlockQ5_K, scales), dst);
    for (int g = 0; g < 8; ++g)
        gather_bits(
            [&](int r, int column) {
                return (static_cast<uint8_t>(rows[r][offsetof(BlockQ5_K, qh) + column]) >> g) & 1;
            },
            dst + 256 + 64 * g);
    transpose<uint32_t>(rows, offsetof(BlockQ5_K, qs), 32, dst + 768);
}

void pack_q6_k(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockQ6_K, d), 1, dst);
    transpose<uint8_t>(rows, offsetof(BlockQ6_K, scales), 16, dst + 32);
    transpose<uint32_t>(rows, offsetof(BlockQ6_K, ql), 32, dst + 288);
    transpose<uint32_t>(rows, offsetof(BlockQ6_K, qh), 16, dst + 2336);
}

struct Packing {
    DType dtype;
    int columns;  // a block
    void (*pack)(const std::byte* const* rows, std::byte* dst);
};

constexpr Packing kPackings[] = {
    {DType::F32, 1, [](const std::byte* const* rows, std::byte* dst) { transpose<uint32_t>(rows, 0, 1, dst); }},
    {DType::F16, 1, [](const std::byte* const* rows, std::byte* dst) { transpose<uint16_t>(rows, 0, 1, dst); }},
    {DType::BF16, 2, [](const std::byte* const* rows, std::byte* dst) { transpose<uint32_t>(rows, 0, 1, dst); }},
    {DType::Q4_0, 32, pack_q4_0},
    {DType::Q4_1, 32, pack_q4_1},
    {DType::Q5_0, 32, pack_q5_0},
    {DType::Q8_0, 32, pack_q8_0},
    {DType::Q4_K, 256, pack_q4_k},
    {DType::Q5_K, 256, pack_q5_k},
    {DType::Q6_K, 256, pack_q6_k},
};

const Packing* find_packing(DType dtype) {
    for (const Packing& p : kPackings)
        if (p.dtype == dtype) return &p;
    return nullptr;
}

}  // namespace

size_t panel_bytes(DType dtype, int n_cols) {
    return find_packing(dtype) ? kPanel * row_bytes(format_of(dtype), n_cols) : 0;
}

void pack_panel(DType dtype, const std::byte* rows, size_t row_stride, int n_valid, int n_cols, std::byte* panel) {
    static constexpr std::byte kZeros[256] = {};
    const Packing& packing = *find_packing(dtype);
    const size_t block_bytes = row_bytes(format_of(dtype), packing.columns);
    const std::byte* at[kPanel];
    for (int block = 0; block < n_cols / packing.columns; ++block) {
        for (int r = 0; r < kPanel; ++r) at[r] = r < n_valid ? rows + r * row_stride + block * block_bytes : kZeros;
        packing.pack(at, panel + block * block_bytes * kPanel);
    }
}

}  // namespace gemmart::cpu
