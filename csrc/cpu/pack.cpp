// From rows as in the file to panels of 16 rows (layout.h): a permutation of 4-byte words, scales and high bits.
#include <cstring>

#include "cpu/kernels.h"
#include "formats/iq1_m.h"
#include "formats/iq1_s.h"
#include "formats/iq2_s.h"
#include "formats/iq2_xs.h"
#include "formats/iq2_xxs.h"
#include "formats/iq3_s.h"
#include "formats/iq3_xxs.h"
#include "formats/iq4_nl.h"
#include "formats/iq4_xs.h"
#include "formats/mxfp4.h"
#include "formats/q2_k.h"
#include "formats/q3_k.h"
#include "formats/q4_0.h"
#include "formats/q4_1.h"
#include "formats/q4_k.h"
#include "formats/q5_0.h"
#include "formats/q5_1.h"
#include "formats/q5_k.h"
#include "formats/q6_k.h"
#include "formats/q8_0.h"
#include "formats/tq1_0.h"
#include "formats/tq2_0.h"

namespace gemmart::cpu {
namespace {

// dst [n_words][16] words <- 16 rows of n_words
template <typename Word>
void transpose(const std::byte* const* rows, size_t offset, int n_words, std::byte* dst) {
    for (int i = 0; i < n_words; ++i)
        for (int r = 0; r < kPanel; ++r)
            std::memcpy(dst + (i * kPanel + r) * sizeof(Word), rows[r] + offset + i * sizeof(Word), sizeof(Word));
}

uint32_t word_at(const std::byte* p) {
    uint32_t word;
    std::memcpy(&word, p, 4);
    return word;
}

// out u64 [8 slots] <- a bit a column
void pack_fifth_bits(const std::byte* const* rows, size_t offset, std::byte* dst) {
    uint64_t bits[8] = {};
    for (int r = 0; r < kPanel; ++r)
        for (int s = 0; s < 8; ++s) bits[s] |= static_cast<uint64_t>(word_at(rows[r] + offset) >> 4 * s & 15) << 4 * r;
    std::memcpy(dst, bits, sizeof bits);
}

// out u64 [8 groups][8 slots] <- 32 bytes, of which bit g belongs to group g
void pack_high_bits(const std::byte* const* rows, size_t offset, std::byte* dst) {
    uint64_t bits[8][8] = {};
    for (int r = 0; r < kPanel; ++r)
        for (int s = 0; s < 8; ++s) {
            const uint32_t bytes = word_at(rows[r] + offset + 4 * s);
            for (int g = 0; g < 8; ++g) {
                // the product moves bit 8 b to bit 24 + b
                const uint32_t four = (bytes >> g & 0x01010101) * 0x01020408u >> 24 & 15;
                bits[g][s] |= static_cast<uint64_t>(four) << 4 * r;
            }
        }
    std::memcpy(dst, bits, sizeof bits);
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
    pack_fifth_bits(rows, offsetof(BlockQ5_0, qh), dst + 32);
    transpose<uint32_t>(rows, offsetof(BlockQ5_0, qs), 4, dst + 96);
}

void pack_q5_1(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockQ5_1, d), 1, dst);
    transpose<uint16_t>(rows, offsetof(BlockQ5_1, m), 1, dst + 32);
    pack_fifth_bits(rows, offsetof(BlockQ5_1, qh), dst + 64);
    transpose<uint32_t>(rows, offsetof(BlockQ5_1, qs), 4, dst + 128);
}

void pack_q8_0(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockQ8_0, d), 1, dst);
    transpose<uint32_t>(rows, offsetof(BlockQ8_0, qs), 8, dst + 32);
}

void pack_iq4_nl(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockIQ4_NL, d), 1, dst);
    transpose<uint32_t>(rows, offsetof(BlockIQ4_NL, qs), 4, dst + 32);
}

void pack_q2_k(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockQ2_K, d), 1, dst);
    transpose<uint16_t>(rows, offsetof(BlockQ2_K, dmin), 1, dst + 32);
    transpose<uint8_t>(rows, offsetof(BlockQ2_K, scales), 16, dst + 64);
    transpose<uint32_t>(rows, offsetof(BlockQ2_K, qs), 16, dst + 320);
}

void pack_q3_k(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockQ3_K, d), 1, dst);
    transpose<uint8_t>(rows, offsetof(BlockQ3_K, scales), 12, dst + 32);
    pack_high_bits(rows, offsetof(BlockQ3_K, hmask), dst + 224);
    transpose<uint32_t>(rows, offsetof(BlockQ3_K, qs), 16, dst + 736);
}

// d, dmin and the 6-bit scales and minimums that Q4_K and Q5_K share: 256 bytes
void pack_k_scales(const std::byte* const* rows, size_t d, size_t dmin, size_t scales, std::byte* dst) {
    transpose<uint16_t>(rows, d, 1, dst);
    transpose<uint16_t>(rows, dmin, 1, dst + 32);
    for (int r = 0; r < kPanel; ++r) {
        // The file's order: groups 0-3 in the low six bits of words 0 and 1; groups 4-7 in the nibbles of word 2 and
        // the top two bits. Here each becomes a byte of `six`, group by group.
        const std::byte* s = rows[r] + scales;
        const uint32_t word[3] = {word_at(s), word_at(s + 4), word_at(s + 8)};
        for (int which = 0; which < 2; ++which) {  // scales, minimums
            const uint32_t last = (word[2] >> 4 * which & 0x0f0f0f0f) | (word[which] >> 2 & 0x30303030);
            const uint64_t six = (word[which] & 0x3f3f3f3f) | static_cast<uint64_t>(last) << 32;
            const uint64_t low = six & 0x0f0f0f0f0f0f0f0f, high = six >> 4 & 0x0303030303030303;
            const uint64_t pairs = low | low >> 4, fours = high | high >> 6 | high >> 12 | high >> 18;
            for (int i = 0; i < 4; ++i) dst[64 + 64 * which + i * kPanel + r] = static_cast<std::byte>(pairs >> 16 * i);
            for (int i = 0; i < 2; ++i)
                dst[192 + 32 * which + i * kPanel + r] = static_cast<std::byte>(fours >> 32 * i);
        }
    }
}

void pack_q4_k(const std::byte* const* rows, std::byte* dst) {
    pack_k_scales(rows, offsetof(BlockQ4_K, d), offsetof(BlockQ4_K, dmin), offsetof(BlockQ4_K, scales), dst);
    transpose<uint32_t>(rows, offsetof(BlockQ4_K, qs), 32, dst + 256);
}

void pack_q5_k(const std::byte* const* rows, std::byte* dst) {
    pack_k_scales(rows, offsetof(BlockQ5_K, d), offsetof(BlockQ5_K, dmin), offsetof(BlockQ5_K, scales), dst);
    pack_high_bits(rows, offsetof(BlockQ5_K, qh), dst + 256);
    transpose<uint32_t>(rows, offsetof(BlockQ5_K, qs), 32, dst + 768);
}

void pack_q6_k(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockQ6_K, d), 1, dst);
    transpose<uint8_t>(rows, offsetof(BlockQ6_K, scales), 16, dst + 32);
    transpose<uint32_t>(rows, offsetof(BlockQ6_K, ql), 32, dst + 288);
    transpose<uint32_t>(rows, offsetof(BlockQ6_K, qh), 16, dst + 2336);
}

void pack_iq4_xs(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockIQ4_XS, d), 1, dst);
    transpose<uint8_t>(rows, offsetof(BlockIQ4_XS, scales_l), 4, dst + 32);
    transpose<uint8_t>(rows, offsetof(BlockIQ4_XS, scales_h), 2, dst + 96);
    transpose<uint32_t>(rows, offsetof(BlockIQ4_XS, qs), 32, dst + 128);
}

void pack_iq1_s(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockIQ1_S, d), 1, dst);
    transpose<uint32_t>(rows, offsetof(BlockIQ1_S, qs), 8, dst + 32);
    transpose<uint16_t>(rows, offsetof(BlockIQ1_S, qh), 8, dst + 544);
}

void pack_iq1_m(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockIQ1_M, scales), 4, dst);
    transpose<uint16_t>(rows, offsetof(BlockIQ1_M, qh), 8, dst + 128);
    transpose<uint32_t>(rows, offsetof(BlockIQ1_M, qs), 8, dst + 384);
}

// dst u64 [8 groups][2 halves][4] <- byte(row, i), whose bits belong to columns 8i … 8i + 7
template <typename ByteOf>
void pack_signs(ByteOf byte, std::byte* dst) {
    uint64_t bits[8][2][4] = {};
    for (int r = 0; r < kPanel; ++r)
        for (int i = 0; i < 32; ++i) {
            const uint64_t eight = byte(r, i);
            bits[i / 4][0][i % 4] |= (eight & 15) << 4 * r;
            bits[i / 4][1][i % 4] |= (eight >> 4) << 4 * r;
        }
    std::memcpy(dst, bits, sizeof bits);
}

void pack_iq2_xxs(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockIQ2_XXS, d), 1, dst);
    for (int g = 0; g < 8; ++g) transpose<uint32_t>(rows, offsetof(BlockIQ2_XXS, qs) + 8 * g, 1, dst + 32 + 64 * g);
    pack_signs(
        [&](int r, int i) {
            const uint32_t word = word_at(rows[r] + offsetof(BlockIQ2_XXS, qs) + i / 4 * 8 + 4);
            return (word >> 7 * (i % 4) & 127) | (word >> (28 + i % 4) & 1) << 7;
        },
        dst + 544);
}

void pack_iq2_xs(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockIQ2_XS, d), 1, dst);
    transpose<uint8_t>(rows, offsetof(BlockIQ2_XS, scales), 8, dst + 32);
    for (int i = 0; i < 32; ++i)
        for (int r = 0; r < kPanel; ++r)
            dst[160 + i / 4 * 64 + 4 * r + i % 4] = rows[r][offsetof(BlockIQ2_XS, qs) + 2 * i];
    pack_signs(
        [&](int r, int i) {
            const auto high = static_cast<uint32_t>(rows[r][offsetof(BlockIQ2_XS, qs) + 2 * i + 1]);
            return high >> 1 | (high & 1) << 7;
        },
        dst + 672);
}

void pack_iq2_s(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockIQ2_S, d), 1, dst);
    transpose<uint8_t>(rows, offsetof(BlockIQ2_S, scales), 8, dst + 32);
    transpose<uint8_t>(rows, offsetof(BlockIQ2_S, qh), 8, dst + 160);
    transpose<uint32_t>(rows, offsetof(BlockIQ2_S, qs), 8, dst + 288);
    pack_signs([&](int r, int i) { return static_cast<uint32_t>(rows[r][offsetof(BlockIQ2_S, signs) + i]); },
               dst + 800);
}

void pack_iq3_xxs(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockIQ3_XXS, d), 1, dst);
    transpose<uint32_t>(rows, offsetof(BlockIQ3_XXS, qs), 16, dst + 32);
    pack_signs(
        [&](int r, int i) {
            const uint32_t word = word_at(rows[r] + offsetof(BlockIQ3_XXS, signs) + i / 4 * 4);
            return (word >> 7 * (i % 4) & 127) | (word >> (28 + i % 4) & 1) << 7;
        },
        dst + 1056);
}

void pack_iq3_s(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockIQ3_S, d), 1, dst);
    transpose<uint8_t>(rows, offsetof(BlockIQ3_S, scales), 4, dst + 32);
    transpose<uint8_t>(rows, offsetof(BlockIQ3_S, qh), 8, dst + 96);
    transpose<uint32_t>(rows, offsetof(BlockIQ3_S, qs), 16, dst + 224);
    pack_signs([&](int r, int i) { return static_cast<uint32_t>(rows[r][offsetof(BlockIQ3_S, signs) + i]); },
               dst + 1248);
}

void pack_tq1_0(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockTQ1_0, d), 1, dst);
    transpose<uint32_t>(rows, offsetof(BlockTQ1_0, qs), 12, dst + 32);
    transpose<uint32_t>(rows, offsetof(BlockTQ1_0, qh), 1, dst + 800);
}

void pack_tq2_0(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockTQ2_0, d), 1, dst);
    transpose<uint32_t>(rows, offsetof(BlockTQ2_0, qs), 16, dst + 32);
}

void pack_mxfp4(const std::byte* const* rows, std::byte* dst) {
    transpose<uint8_t>(rows, offsetof(BlockMXFP4, e), 1, dst);
    transpose<uint32_t>(rows, offsetof(BlockMXFP4, qs), 4, dst + 16);
}

struct Packing {
    DType dtype;
    int columns;  // of a block, or of a part of a float row
    void (*pack)(const std::byte* const* rows, std::byte* dst);
};

constexpr Packing kPackings[] = {
    {DType::F32, 32, [](const std::byte* const* rows, std::byte* dst) { transpose<uint32_t>(rows, 0, 32, dst); }},
    {DType::F16, 32, [](const std::byte* const* rows, std::byte* dst) { transpose<uint16_t>(rows, 0, 32, dst); }},
    {DType::BF16, 32, [](const std::byte* const* rows, std::byte* dst) { transpose<uint32_t>(rows, 0, 16, dst); }},
    {DType::Q4_0, 32, pack_q4_0},
    {DType::Q4_1, 32, pack_q4_1},
    {DType::Q5_0, 32, pack_q5_0},
    {DType::Q5_1, 32, pack_q5_1},
    {DType::Q8_0, 32, pack_q8_0},
    {DType::IQ4_NL, 32, pack_iq4_nl},
    {DType::IQ4_XS, 256, pack_iq4_xs},
    {DType::Q2_K, 256, pack_q2_k},
    {DType::Q3_K, 256, pack_q3_k},
    {DType::Q4_K, 256, pack_q4_k},
    {DType::Q5_K, 256, pack_q5_k},
    {DType::Q6_K, 256, pack_q6_k},
    {DType::IQ1_S, 256, pack_iq1_s},
    {DType::IQ1_M, 256, pack_iq1_m},
    {DType::IQ2_XXS, 256, pack_iq2_xxs},
    {DType::IQ2_XS, 256, pack_iq2_xs},
    {DType::IQ2_S, 256, pack_iq2_s},
    {DType::IQ3_XXS, 256, pack_iq3_xxs},
    {DType::IQ3_S, 256, pack_iq3_s},
    {DType::TQ1_0, 256, pack_tq1_0},
    {DType::TQ2_0, 256, pack_tq2_0},
    {DType::MXFP4, 32, pack_mxfp4},
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
