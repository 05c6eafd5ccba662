// From rows as in the file to panels of 16 rows (layout.h): a permutation of 4-byte words, scales and high bits.
#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

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

// Vectors of 16 bytes, which every CPU has: one panel's transposes stay in registers.
template <typename T>
struct VectorOf {
    static constexpr int kLanes = 16 / sizeof(T);
    typedef T Type __attribute__((vector_size(16)));
};

// The halves of a and b, lane by lane in turn.
template <typename V, int... I>
void zip(V a, V b, V& low, V& high, std::integer_sequence<int, I...>) {
    constexpr int kLanes = sizeof...(I);
    low = __builtin_shufflevector(a, b, (I / 2 + I % 2 * kLanes)...);
    high = __builtin_shufflevector(a, b, (kLanes / 2 + I / 2 + I % 2 * kLanes)...);
}

// Of the numbers of all vectors in a row, each index's highest bit becomes its lowest, `n_bits` times: so the first
// n_bits change places with the rest.
template <typename T, int N>
void rotate_index(typename VectorOf<T>::Type (&v)[N], int n_bits) {
    for (int step = 0; step < n_bits; ++step) {
        typename VectorOf<T>::Type from[N];
        std::copy_n(v, N, from);
        for (int i = 0; i < N / 2; ++i)
            zip(from[i], from[i + N / 2], v[2 * i], v[2 * i + 1],
                std::make_integer_sequence<int, VectorOf<T>::kLanes>());
    }
}

// dst [16] <- a number of 16 rows
template <typename T>
void gather(const std::byte* const* rows, size_t offset, void* dst) {
    for (int r = 0; r < kPanel; ++r) std::memcpy(static_cast<T*>(dst) + r, rows[r] + offset, sizeof(T));
}

// dst [n][16] <- 16 rows of n numbers
template <typename T>
void transpose(const std::byte* const* rows, size_t offset, int n, std::byte* dst) {
    constexpr int kLanes = VectorOf<T>::kLanes;
    using V = typename VectorOf<T>::Type;
    const int n_whole = n / kLanes * kLanes;
    for (int i = 0; i < n_whole; i += kLanes)
        for (int r = 0; r < kPanel; r += kLanes) {
            V v[kLanes];
            for (int k = 0; k < kLanes; ++k) std::memcpy(&v[k], rows[r + k] + offset + i * sizeof(T), sizeof(V));
            rotate_index<T>(v, std::countr_zero(static_cast<unsigned>(kLanes)));
            for (int k = 0; k < kLanes; ++k) std::memcpy(dst + ((i + k) * kPanel + r) * sizeof(T), &v[k], sizeof(V));
        }
    for (size_t i = n_whole; i < static_cast<size_t>(n); ++i)
        gather<T>(rows, offset + i * sizeof(T), dst + i * kPanel * sizeof(T));
}

// dst [n][16] <- bytes [first, first + n) of the 16 at `offset` of each row
void transpose_bytes(const std::byte* const* rows, size_t offset, int first, int n, std::byte* dst) {
    std::byte all[kPanel][kPanel];
    transpose<uint8_t>(rows, offset, kPanel, all[0]);
    std::memcpy(dst, all[first], n * kPanel);
}

// 8 lines of 8 bytes, two a vector. A word of each row makes a line of two rows; a slot's bits are a line too, two rows
// a byte.
typedef uint64_t Lines __attribute__((vector_size(16)));

void transpose_lines(Lines (&lines)[4], std::byte* dst, size_t stride) {
    VectorOf<uint8_t>::Type v[4];
    std::memcpy(v, lines, sizeof v);
    rotate_index<uint8_t>(v, 3);
    for (int i = 0; i < 8; ++i) std::memcpy(dst + i * stride, reinterpret_cast<const std::byte*>(v) + 8 * i, 8);
}

// out u64 [8 slots] <- a bit a column
void pack_fifth_bits(const std::byte* const* rows, size_t offset, std::byte* dst) {
    Lines lines[4];
    gather<uint32_t>(rows, offset, lines);
    for (Lines& line : lines) {
        // 8 groups of 4 bits become bytes, those of the second row over those of the first
        const auto spread = [](Lines x) {
            x = (x | x << 16) & 0x0000ffff0000ffff;
            x = (x | x << 8) & 0x00ff00ff00ff00ff;
            return (x | x << 4) & 0x0f0f0f0f0f0f0f0f;
        };
        line = spread(line & 0xffffffff) | spread(line >> 32) << 4;
    }
    transpose_lines(lines, dst, 8);
}

// out u64 [8 groups][8 slots] <- 32 bytes, of which bit g belongs to group g
void pack_high_bits(const std::byte* const* rows, size_t offset, std::byte* dst) {
    Lines slots[8][4];
    transpose<uint32_t>(rows, offset, 8, reinterpret_cast<std::byte*>(slots));
    for (int s = 0; s < 8; ++s) {
        for (Lines& line : slots[s]) {
            // 8 bytes of 8 bits, transposed: byte g has bit g of each
            const auto swap = [&](int distance, uint64_t bits) {
                const Lines moved = (line ^ line >> distance) & bits;
                line ^= moved ^ moved << distance;
            };
            swap(7, 0x00aa00aa00aa00aa), swap(14, 0x0000cccc0000cccc), swap(28, 0x00000000f0f0f0f0);
        }
        transpose_lines(slots[s], dst + 8 * s, 64);
    }
}

void pack_q4_0(const std::byte* const* rows, std::byte* dst) {
    gather<uint16_t>(rows, offsetof(BlockQ4_0, d), dst);
    transpose<uint32_t>(rows, offsetof(BlockQ4_0, qs), 4, dst + 32);
}

void pack_q4_1(const std::byte* const* rows, std::byte* dst) {
    gather<uint16_t>(rows, offsetof(BlockQ4_1, d), dst);
    gather<uint16_t>(rows, offsetof(BlockQ4_1, m), dst + 32);
    transpose<uint32_t>(rows, offsetof(BlockQ4_1, qs), 4, dst + 64);
}

void pack_q5_0(const std::byte* const* rows, std::byte* dst) {
    gather<uint16_t>(rows, offsetof(BlockQ5_0, d), dst);
    pack_fifth_bits(rows, offsetof(BlockQ5_0, qh), dst + 32);
    transpose<uint32_t>(rows, offsetof(BlockQ5_0, qs), 4, dst + 96);
}

void pack_q5_1(const std::byte* const* rows, std::byte* dst) {
    gather<uint16_t>(rows, offsetof(BlockQ5_1, d), dst);
    gather<uint16_t>(rows, offsetof(BlockQ5_1, m), dst + 32);
    pack_fifth_bits(rows, offsetof(BlockQ5_1, qh), dst + 64);
    transpose<uint32_t>(rows, offsetof(BlockQ5_1, qs), 4, dst + 128);
}

void pack_q8_0(const std::byte* const* rows, std::byte* dst) {
    gather<uint16_t>(rows, offsetof(BlockQ8_0, d), dst);
    transpose<uint32_t>(rows, offsetof(BlockQ8_0, qs), 8, dst + 32);
}

void pack_iq4_nl(const std::byte* const* rows, std::byte* dst) {
    gather<uint16_t>(rows, offsetof(BlockIQ4_NL, d), dst);
    transpose<uint32_t>(rows, offsetof(BlockIQ4_NL, qs), 4, dst + 32);
}

void pack_q2_k(const std::byte* const* rows, std::byte* dst) {
    gather<uint16_t>(rows, offsetof(BlockQ2_K, d), dst);
    gather<uint16_t>(rows, offsetof(BlockQ2_K, dmin), dst + 32);
    transpose<uint8_t>(rows, offsetof(BlockQ2_K, scales), 16, dst + 64);
    transpose<uint32_t>(rows, offsetof(BlockQ2_K, qs), 16, dst + 320);
}

void pack_q3_k(const std::byte* const* rows, std::byte* dst) {
    gather<uint16_t>(rows, offsetof(BlockQ3_K, d), dst);
    // with 2 bytes before them, so that 16 are read within the block
    transpose_bytes(rows, offsetof(BlockQ3_K, scales) - 2, 2, 12, dst + 32);
    std::byte bits[2][256];
    pack_high_bits(rows, offsetof(BlockQ3_K, hmask), bits[0]);
    for (int half = 0; half < 2; ++half) {
        std::byte* to = dst + 224 + half * 768;
        std::memcpy(to, bits[half], 256);
        transpose<uint32_t>(rows, offsetof(BlockQ3_K, qs) + half * 32, 8, to + 256);
    }
}

// d, dmin and the 6-bit scales and minimums that Q4_K and Q5_K share: 256 bytes
void pack_k_scales(const std::byte* const* rows, size_t d, size_t dmin, size_t scales, std::byte* dst) {
    gather<uint16_t>(rows, d, dst);
    gather<uint16_t>(rows, dmin, dst + 32);
    // The file's order: groups 0-3 in the low six bits of words 0 and 1; groups 4-7 in the nibbles of word 2 and the
    // top two bits.
    uint32_t words[3][kPanel];
    for (int i = 0; i < 3; ++i) gather<uint32_t>(rows, scales + 4 * i, words[i]);
    for (int which = 0; which < 2; ++which)     // scales, minimums
        for (int half = 0; half < 2; ++half) {  // groups 0-3, 4-7
            std::byte* low = dst + 64 + 64 * which + 2 * half * kPanel;
            std::byte* high = dst + 192 + 32 * which + half * kPanel;
            for (int r = 0; r < kPanel; ++r) {
                const uint32_t word = words[which][r];
                const uint32_t six = half ? (words[2][r] >> 4 * which & 0x0f0f0f0f) | (word >> 2 & 0x30303030) : word;
                const uint32_t four = six & 0x0f0f0f0f, two = six >> 4 & 0x03030303;
                const uint32_t pairs = four | four >> 4;
                low[r] = static_cast<std::byte>(pairs);
                low[r + kPanel] = static_cast<std::byte>(pairs >> 16);
                high[r] = static_cast<std::byte>(two | two >> 6 | two >> 12 | two >> 18);
            }
        }
}

void pack_q4_k(const std::byte* const* rows, std::byte* dst) {
    pack_k_scales(rows, offsetof(BlockQ4_K, d), offsetof(BlockQ4_K, dmin), offsetof(BlockQ4_K, scales), dst);
    transpose<uint32_t>(rows, offsetof(BlockQ4_K, qs), 32, dst + 256);
}

void pack_q5_k(const std::byte* const* rows, std::byte* dst) {
    pack_k_scales(rows, offsetof(BlockQ5_K, d), offsetof(BlockQ5_K, dmin), offsetof(BlockQ5_K, scales), dst);
    std::byte bits[4][128];
    pack_high_bits(rows, offsetof(BlockQ5_K, qh), bits[0]);
    for (int pair = 0; pair < 4; ++pair) {
        std::byte* to = dst + 256 + pair * 640;
        std::memcpy(to, bits[pair], 128);
        transpose<uint32_t>(rows, offsetof(BlockQ5_K, qs) + pair * 32, 8, to + 128);
    }
}

void pack_q6_k(const std::byte* const* rows, std::byte* dst) {
    gather<uint16_t>(rows, offsetof(BlockQ6_K, d), dst);
    transpose<uint8_t>(rows, offsetof(BlockQ6_K, scales), 16, dst + 32);
    for (int half = 0; half < 2; ++half) {
        std::byte* to = dst + 288 + half * 1536;
        std::byte low[8][64], high[8][64];
        transpose<uint32_t>(rows, offsetof(BlockQ6_K, ql) + half * 64, 8, low[0]);
        transpose<uint32_t>(rows, offsetof(BlockQ6_K, qh) + half * 32, 8, high[0]);
        for (int s = 0; s < 8; ++s) {
            std::memcpy(to + s * 128, low[s], 64);
            std::memcpy(to + s * 128 + 64, high[s], 64);
        }
        transpose<uint32_t>(rows, offsetof(BlockQ6_K, ql) + half * 64 + 32, 8, to + 1024);
    }
}

void pack_iq4_xs(const std::byte* const* rows, std::byte* dst) {
    gather<uint16_t>(rows, offsetof(BlockIQ4_XS, d), dst);
    transpose_bytes(rows, 0, offsetof(BlockIQ4_XS, scales_l), 4, dst + 32);
    transpose_bytes(rows, 0, offsetof(BlockIQ4_XS, scales_h), 2, dst + 96);
    transpose<uint32_t>(rows, offsetof(BlockIQ4_XS, qs), 32, dst + 128);
}

void pack_iq1_s(const std::byte* const* rows, std::byte* dst) {
    gather<uint16_t>(rows, offsetof(BlockIQ1_S, d), dst);
    transpose<uint32_t>(rows, offsetof(BlockIQ1_S, qs), 8, dst + 32);
    transpose<uint16_t>(rows, offsetof(BlockIQ1_S, qh), 8, dst + 544);
}

void pack_iq1_m(const std::byte* const* rows, std::byte* dst) {
    transpose<uint16_t>(rows, offsetof(BlockIQ1_M, scales), 4, dst);
    transpose<uint16_t>(rows, offsetof(BlockIQ1_M, qh), 8, dst + 128);
    transpose<uint32_t>(rows, offsetof(BlockIQ1_M, qs), 8, dst + 384);
}

uint32_t word_at(const std::byte* p) {
    uint32_t word;
    std::memcpy(&word, p, 4);
    return word;
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
    gather<uint16_t>(rows, offsetof(BlockIQ2_XXS, d), dst);
    for (int g = 0; g < 8; ++g) gather<uint32_t>(rows, offsetof(BlockIQ2_XXS, qs) + 8 * g, dst + 32 + 64 * g);
    pack_signs(
        [&](int r, int i) {
            const uint32_t word = word_at(rows[r] + offsetof(BlockIQ2_XXS, qs) + i / 4 * 8 + 4);
            return (word >> 7 * (i % 4) & 127) | (word >> (28 + i % 4) & 1) << 7;
        },
        dst + 544);
}

void pack_iq2_xs(const std::byte* const* rows, std::byte* dst) {
    gather<uint16_t>(rows, offsetof(BlockIQ2_XS, d), dst);
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
    gather<uint16_t>(rows, offsetof(BlockIQ2_S, d), dst);
    transpose<uint8_t>(rows, offsetof(BlockIQ2_S, scales), 8, dst + 32);
    transpose<uint8_t>(rows, offsetof(BlockIQ2_S, qh), 8, dst + 160);
    transpose<uint32_t>(rows, offsetof(BlockIQ2_S, qs), 8, dst + 288);
    pack_signs([&](int r, int i) { return static_cast<uint32_t>(rows[r][offsetof(BlockIQ2_S, signs) + i]); },
               dst + 800);
}

void pack_iq3_xxs(const std::byte* const* rows, std::byte* dst) {
    gather<uint16_t>(rows, offsetof(BlockIQ3_XXS, d), dst);
    transpose<uint32_t>(rows, offsetof(BlockIQ3_XXS, qs), 16, dst + 32);
    pack_signs(
        [&](int r, int i) {
            const uint32_t word = word_at(rows[r] + offsetof(BlockIQ3_XXS, signs) + i / 4 * 4);
            return (word >> 7 * (i % 4) & 127) | (word >> (28 + i % 4) & 1) << 7;
        },
        dst + 1056);
}

void pack_iq3_s(const std::byte* const* rows, std::byte* dst) {
    gather<uint16_t>(rows, offsetof(BlockIQ3_S, d), dst);
    transpose<uint8_t>(rows, offsetof(BlockIQ3_S, scales), 4, dst + 32);
    transpose<uint8_t>(rows, offsetof(BlockIQ3_S, qh), 8, dst + 96);
    transpose<uint32_t>(rows, offsetof(BlockIQ3_S, qs), 16, dst + 224);
    pack_signs([&](int r, int i) { return static_cast<uint32_t>(rows[r][offsetof(BlockIQ3_S, signs) + i]); },
               dst + 1248);
}

void pack_tq1_0(const std::byte* const* rows, std::byte* dst) {
    gather<uint16_t>(rows, offsetof(BlockTQ1_0, d), dst);
    transpose<uint32_t>(rows, offsetof(BlockTQ1_0, qs), 12, dst + 32);
    gather<uint32_t>(rows, offsetof(BlockTQ1_0, qh), dst + 800);
}

void pack_tq2_0(const std::byte* const* rows, std::byte* dst) {
    gather<uint16_t>(rows, offsetof(BlockTQ2_0, d), dst);
    transpose<uint32_t>(rows, offsetof(BlockTQ2_0, qs), 16, dst + 32);
}

void pack_mxfp4(const std::byte* const* rows, std::byte* dst) {
    gather<uint8_t>(rows, offsetof(BlockMXFP4, e), dst);
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
        for (int r = 0; r < kPanel; ++r) {
            at[r] = r < n_valid ? rows + r * row_stride + block * block_bytes : kZeros;
            // The next panel is likely to be packed next: sixteen rows side by side are no stream for the hardware.
            for (size_t i = 0; i < block_bytes; i += 64) __builtin_prefetch(at[r] + kPanel * row_stride + i, 0, 2);
        }
        packing.pack(at, panel + block * block_bytes * kPanel);
    }
}

}  // namespace gemmart::cpu
