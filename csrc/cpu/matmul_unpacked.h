// Sources of the formats whose weights are found in codebooks (IQ1, IQ2, IQ3) or are digits in base 3 (TQ1_0). To
// unpack them takes longer than to multiply with a few columns, so blocks are always unpacked to scratch, once for all
// columns.
//
// An entry of a codebook is looked up for V::kLanes rows at once, by a gather, which takes most of the time: eight
// cycles for 16 entries (Xeon with AMX, 3.8 GHz). An entry holds the number of a level for each of its weights, in
// four bits: 8 weights in 32 bits. The fourth bit of a number is the weight's sign (in IQ1 that of the shift), so that
// one shuffle makes a byte of both.
#pragma once

#include "formats/grids.h"

namespace gemmart::cpu {
namespace {

// ---- Codebooks

template <int N>
struct Codebook {
    uint32_t codes[N];
};

// Eight weights an entry: the first four in the low halves of the bytes, the others in the high halves, since a slot
// holds four columns.
template <int N>
constexpr Codebook<N> codebook_of_eights(const uint16_t (&grid)[N]) {
    Codebook<N> book{};
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < 8; ++j) book.codes[i] |= (grid[i] >> 2 * j & 3u) << (8 * (j % 4) + 4 * (j / 4));
    return book;
}

// Four weights an entry, a byte each.
template <int N>
constexpr Codebook<N> codebook_of_fours(const uint16_t (&grid)[N]) {
    Codebook<N> book{};
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < 4; ++j) book.codes[i] |= (grid[i] >> 4 * j & 15u) << 8 * j;
    return book;
}

constexpr auto kIQ1Book = codebook_of_eights(kIQ1Grid);
constexpr auto kIQ2XXSBook = codebook_of_eights(kIQ2XXSGrid);
constexpr auto kIQ2XSBook = codebook_of_eights(kIQ2XSGrid);
constexpr auto kIQ2SBook = codebook_of_eights(kIQ2SGrid);
constexpr auto kIQ3XXSBook = codebook_of_fours(kIQ3XXSGrid);
constexpr auto kIQ3SBook = codebook_of_fours(kIQ3SGrid);

// A weight by its number and, in bit 3, its sign, as an unsigned byte around `zero`.
struct Levels {
    int8_t bytes[16];
};

template <int N>
constexpr Levels with_signs(const int8_t (&magnitudes)[N], int zero) {
    Levels levels{};
    for (int i = 0; i < 8; ++i)
        for (int minus = 0; minus < 2; ++minus)
            levels.bytes[i + 8 * minus] =
                static_cast<int8_t>(i < N ? zero + (minus ? -magnitudes[i] : magnitudes[i]) : zero);
    return levels;
}

constexpr Levels kIQ2 = with_signs(kIQ2Levels, 64);
constexpr Levels kIQ3XXS = with_signs(kIQ3XXSLevels, 64);
constexpr Levels kIQ3S = with_signs(kIQ3SLevels, 16);
// Eighths: 8 · level ± 1
constexpr Levels kIQ1 = {{9, 17, 25, 16, 16, 16, 16, 16, 7, 15, 23, 16, 16, 16, 16, 16}};

// ---- Signs: a bit a weight, u64 [2][4] a group of 32 columns; [0] holds the even slots, [1] the odd ones, and bit
// 4r + b belongs to row r, column b of the slot.

constexpr int kSignBytes = 64;

// A block's signs where only seven of eight are stored, the eighth making the number of minuses even; its place, bit
// 4r + 3 of the odd slots, holds another bit of the block.
struct EvenSigns {
    unsigned long long signs[8][2][4];
    unsigned long long others[8][4];  // the bits from the eighth places; zero elsewhere

    explicit EvenSigns(Bytes p) {
        constexpr uint64_t kEighth = 0x8888888888888888;
        for (int g = 0; g < 8; ++g)
            for (int j = 0; j < 4; ++j) {
                uint64_t even, odd;
                __builtin_memcpy(&even, p + g * kSignBytes + 8 * j, 8);
                __builtin_memcpy(&odd, p + g * kSignBytes + 32 + 8 * j, 8);
                uint64_t parity = even ^ (odd & ~kEighth);  // of each four bits, in the lowest of them
                parity ^= parity >> 2, parity ^= parity >> 1;
                signs[g][0][j] = even;
                signs[g][1][j] = (odd & ~kEighth) | (parity << 3 & kEighth);
                others[g][j] = odd & kEighth;
            }
    }
    Bytes of_group(int g) const { return reinterpret_cast<Bytes>(signs[g]); }
    Bytes other(int g, int j) const { return reinterpret_cast<Bytes>(&others[g][j]); }
};

// Slot s of a group from the numbers of its weights' levels; `signs` are those of the group.
template <typename V>
GEMMART_INLINE typename V::B signed_levels(const Levels& levels, typename V::B numbers, Bytes signs, int s, int lane) {
    return V::look_up(levels.bytes, V::template with_bit<3>(numbers, signs + s % 2 * 32 + s / 2 * 8 + lane / 2));
}

// The four bits at `low` of a byte a row, as floats.
template <typename V>
GEMMART_INLINE typename V::F four_bits(Bytes p, int low) {
    return V::from_u8(_mm_and_si128(_mm_srli_epi16(V::lane_bytes(p), low), _mm_set1_epi8(15)));
}

// f(group's number, first row, group) for the eight groups of a block and each part of their rows
template <typename V, typename Group, typename F>
GEMMART_INLINE void each_group(uint8_t* out, F f) {
    for (int lane = 0; lane < kPanel; lane += V::kLanes)
        for (int g = 0; g < 8; ++g) f(g, lane, out + g * Group::kBytes);
}

// ---- Formats. unpack() turns a block of 256 columns of a panel into eight groups.

template <typename V>
struct IQ2_XXS {
    static constexpr int kColumns = 256, kParts = 1, kBits = 7, kBytes = 1056, kBias = 64;
    static constexpr bool kOffset = false;
    using Group = UnpackedGroup<V, kParts, kBits, kBias, kOffset>;

    template <typename Change>
    static GEMMART_INLINE void unpack(Bytes p, uint8_t* out, Change change) {
        const EvenSigns signs(p + 544);
        each_group<V, Group>(out, [&](int g, int lane, uint8_t* group) __attribute__((always_inline)) {
            const auto entries = V::load_bytes(p + 32 + 64 * g + 4 * lane);
            auto scale = V::zero();
            unroll<4>([&](auto index) __attribute__((always_inline)) {
                constexpr int j = decltype(index)::value;
                const auto eight = V::gather(kIQ2XXSBook.codes, V::template bits<8 * j, 0, 8>(entries));
                Group::store_slot(group, 2 * j, lane,
                                  change(signed_levels<V>(kIQ2, V::low_nibble(eight), signs.of_group(g), 2 * j, lane)));
                Group::store_slot(
                    group, 2 * j + 1, lane,
                    change(signed_levels<V>(kIQ2, V::high_nibble(eight), signs.of_group(g), 2 * j + 1, lane)));
                scale = V::template with_bit<j>(scale, signs.other(g, j) + lane / 2);
            });
            const auto s = V::from_s32(V::template bits<24, 0, 4>(scale));
            Group::store_scale(group, 0, lane,
                               V::mul(V::halves(p + 2 * lane), V::fma(s, V::set(0.25f), V::set(0.125f))));
        });
    }
};

// IQ2_XS and IQ2_S: the two scales of group g.
template <typename V, typename Group>
GEMMART_INLINE void store_iq2_scales(Bytes p, int g, int lane, uint8_t* group) {
    for (int part = 0; part < 2; ++part) {
        const auto s = V::fma(four_bits<V>(p + 32 + g * kPanel + lane, 4 * part), V::set(0.25f), V::set(0.125f));
        Group::store_scale(group, part, lane, V::mul(V::halves(p + 2 * lane), s));
    }
}

template <typename V>
struct IQ2_XS {
    static constexpr int kColumns = 256, kParts = 2, kBits = 7, kBytes = 1184, kBias = 64;
    static constexpr bool kOffset = false;
    using Group = UnpackedGroup<V, kParts, kBits, kBias, kOffset>;

    template <typename Change>
    static GEMMART_INLINE void unpack(Bytes p, uint8_t* out, Change change) {
        const EvenSigns signs(p + 672);
        each_group<V, Group>(out, [&](int g, int lane, uint8_t* group) __attribute__((always_inline)) {
            const auto low = V::load_bytes(p + 160 + 64 * g + 4 * lane);
            unroll<4>([&](auto index) __attribute__((always_inline)) {
                constexpr int j = decltype(index)::value;
                const auto ninth = V::template with_bit<0>(V::zero(), signs.other(g, j) + lane / 2);
                const auto eight =
                    V::gather(kIQ2XSBook.codes, V::template bits<8 * j, 0, 8>(low) | V::template bits<24, 8, 1>(ninth));
                Group::store_slot(group, 2 * j, lane,
                                  change(signed_levels<V>(kIQ2, V::low_nibble(eight), signs.of_group(g), 2 * j, lane)));
                Group::store_slot(
                    group, 2 * j + 1, lane,
                    change(signed_levels<V>(kIQ2, V::high_nibble(eight), signs.of_group(g), 2 * j + 1, lane)));
            });
            store_iq2_scales<V, Group>(p, g, lane, group);
        });
    }
};

template <typename V>
struct IQ2_S {
    static constexpr int kColumns = 256, kParts = 2, kBits = 7, kBytes = 1312, kBias = 64;
    static constexpr bool kOffset = false;
    using Group = UnpackedGroup<V, kParts, kBits, kBias, kOffset>;

    template <typename Change>
    static GEMMART_INLINE void unpack(Bytes p, uint8_t* out, Change change) {
        each_group<V, Group>(out, [&](int g, int lane, uint8_t* group) __attribute__((always_inline)) {
            const auto low = V::load_bytes(p + 288 + 64 * g + 4 * lane);
            const auto high = V::widen(V::lane_bytes(p + 160 + g * kPanel + lane));
            unroll<4>([&](auto index) __attribute__((always_inline)) {
                constexpr int j = decltype(index)::value;
                const auto eight = V::gather(kIQ2SBook.codes,
                                             V::template bits<8 * j, 0, 8>(low) | V::template bits<2 * j, 8, 2>(high));
                const Bytes signs = p + 800 + g * kSignBytes;
                Group::store_slot(group, 2 * j, lane,
                                  change(signed_levels<V>(kIQ2, V::low_nibble(eight), signs, 2 * j, lane)));
                Group::store_slot(group, 2 * j + 1, lane,
                                  change(signed_levels<V>(kIQ2, V::high_nibble(eight), signs, 2 * j + 1, lane)));
            });
            store_iq2_scales<V, Group>(p, g, lane, group);
        });
    }
};

template <typename V>
struct IQ3_XXS {
    static constexpr int kColumns = 256, kParts = 1, kBits = 7, kBytes = 1568, kBias = 64;
    static constexpr bool kOffset = false;
    using Group = UnpackedGroup<V, kParts, kBits, kBias, kOffset>;

    template <typename Change>
    static GEMMART_INLINE void unpack(Bytes p, uint8_t* out, Change change) {
        const EvenSigns signs(p + 1056);
        each_group<V, Group>(out, [&](int g, int lane, uint8_t* group) __attribute__((always_inline)) {
            const Bytes at = p + 32 + 128 * g + 4 * lane;
            const typename V::B entries[2] = {V::load_bytes(at), V::load_bytes(at + 64)};
            auto scale = V::zero();
            unroll<8>([&](auto index) __attribute__((always_inline)) {
                constexpr int s = decltype(index)::value;
                const auto entry = V::template bits<8 * (s % 4), 0, 8>(entries[s / 4]);
                Group::store_slot(
                    group, s, lane,
                    change(signed_levels<V>(kIQ3XXS, V::gather(kIQ3XXSBook.codes, entry), signs.of_group(g), s, lane)));
                if constexpr (s < 4) scale = V::template with_bit<s>(scale, signs.other(g, s) + lane / 2);
            });
            const auto s = V::from_s32(V::template bits<24, 0, 4>(scale));
            Group::store_scale(group, 0, lane, V::mul(V::halves(p + 2 * lane), V::fma(s, V::set(0.5f), V::set(0.25f))));
        });
    }
};

template <typename V>
struct IQ3_S {
    static constexpr int kColumns = 256, kParts = 1, kBits = 5, kBytes = 1760, kBias = 16;
    static constexpr bool kOffset = false;
    using Group = UnpackedGroup<V, kParts, kBits, kBias, kOffset>;

    template <typename Change>
    static GEMMART_INLINE void unpack(Bytes p, uint8_t* out, Change change) {
        each_group<V, Group>(out, [&](int g, int lane, uint8_t* group) __attribute__((always_inline)) {
            const Bytes at = p + 224 + 128 * g + 4 * lane;
            const typename V::B low[2] = {V::load_bytes(at), V::load_bytes(at + 64)};
            const auto high = V::widen(V::lane_bytes(p + 96 + g * kPanel + lane));
            unroll<8>([&](auto index) __attribute__((always_inline)) {
                constexpr int s = decltype(index)::value;
                const auto entry = V::template bits<8 * (s % 4), 0, 8>(low[s / 4]) | V::template bits<s, 8, 1>(high);
                Group::store_slot(group, s, lane,
                                  change(signed_levels<V>(kIQ3S, V::gather(kIQ3SBook.codes, entry),
                                                          p + 1248 + g * kSignBytes, s, lane)));
            });
            const auto s = four_bits<V>(p + 32 + g / 2 * kPanel + lane, 4 * (g % 2));
            Group::store_scale(group, 0, lane, V::mul(V::halves(p + 2 * lane), V::fma(s, V::set(2), V::set(1))));
        });
    }
};

// IQ1: slots 2 j and 2 j + 1 from an entry; `minus`: all bits of a row whose shift is negative.
template <typename V, typename Group, typename Change>
GEMMART_INLINE void store_iq1(uint8_t* group, int j, int lane, typename V::B entry, typename V::B minus,
                              Change change) {
    const auto eight = V::gather(kIQ1Book.codes, entry) | (minus & V::set_bytes(0x88));
    Group::store_slot(group, 2 * j, lane, change(V::look_up(kIQ1.bytes, V::low_nibble(eight))));
    Group::store_slot(group, 2 * j + 1, lane, change(V::look_up(kIQ1.bytes, V::high_nibble(eight))));
}

template <typename V>
struct IQ1_S {
    static constexpr int kColumns = 256, kParts = 1, kBits = 5, kBytes = 800, kBias = 16;
    static constexpr bool kOffset = false;
    using Group = UnpackedGroup<V, kParts, kBits, kBias, kOffset>;

    template <typename Change>
    static GEMMART_INLINE void unpack(Bytes p, uint8_t* out, Change change) {
        each_group<V, Group>(out, [&](int g, int lane, uint8_t* group) __attribute__((always_inline)) {
            const auto low = V::load_bytes(p + 32 + 64 * g + 4 * lane);
            const auto high = V::words(p + 544 + 32 * g + 2 * lane);
            unroll<4>([&](auto index) __attribute__((always_inline)) {
                constexpr int j = decltype(index)::value;
                store_iq1<V, Group>(group, j, lane,
                                    V::template bits<8 * j, 0, 8>(low) | V::template bits<3 * j, 8, 3>(high),
                                    V::template all<15>(high), change);
            });
            const auto s = V::from_s32(V::template bits<12, 0, 3>(high));
            Group::store_scale(group, 0, lane,
                               V::mul(V::halves(p + 2 * lane), V::fma(s, V::set(0.25f), V::set(0.125f))));
        });
    }
};

template <typename V>
struct IQ1_M {
    static constexpr int kColumns = 256, kParts = 2, kBits = 5, kBytes = 896, kBias = 16;
    static constexpr bool kOffset = false;
    using Group = UnpackedGroup<V, kParts, kBits, kBias, kOffset>;

    template <typename Change>
    static GEMMART_INLINE void unpack(Bytes p, uint8_t* out, Change change) {
        each_group<V, Group>(out, [&](int g, int lane, uint8_t* group) __attribute__((always_inline)) {
            const auto low = V::load_bytes(p + 384 + 64 * g + 4 * lane);
            const auto high = V::words(p + 128 + 32 * g + 2 * lane);
            unroll<4>([&](auto index) __attribute__((always_inline)) {
                constexpr int j = decltype(index)::value;
                store_iq1<V, Group>(group, j, lane,
                                    V::template bits<8 * j, 0, 8>(low) | V::template bits<4 * j, 8, 3>(high),
                                    V::template all<4 * j + 3>(high), change);
            });
            auto d = V::zero();
            unroll<4>([&](auto index) __attribute__((always_inline)) {
                constexpr int k = decltype(index)::value;
                d = d | V::template bits<12, 4 * k, 4>(V::words(p + 32 * k + 2 * lane));
            });
            const auto scales = V::words(p + g / 2 * 32 + 2 * lane), own = V::shift_right(scales, g % 2 * 6);
            unroll<2>([&](auto index) __attribute__((always_inline)) {
                constexpr int part = decltype(index)::value;
                const auto s = V::from_s32(V::template bits<3 * part, 0, 3>(own));
                Group::store_scale(group, part, lane, V::mul(V::halves(d), V::fma(s, V::set(0.25f), V::set(0.125f))));
            });
        });
    }
};

template <typename V>
struct TQ1_0 {
    static constexpr int kColumns = 256, kParts = 1, kBits = 4, kBytes = 864, kBias = 1;
    static constexpr bool kOffset = false;
    using Group = UnpackedGroup<V, kParts, kBits, kBias, kOffset>;

    // The first digits of a word's bytes: slots s, s + step …
    template <int kDigits, typename Change>
    static GEMMART_INLINE void digits(Bytes word, int s, int step, int lane, uint8_t* out, Change change) {
        auto fractions = V::load_bytes(word + 4 * lane);
        unroll<kDigits>([&](auto) __attribute__((always_inline)) {
            Group::store_slot(out + s / 8 * Group::kBytes, s % 8, lane, change(V::thirds(fractions)));
            fractions = V::add_bytes(fractions, V::add_bytes(fractions, fractions));
            s += step;
        });
    }
    template <typename Change>
    static GEMMART_INLINE void unpack(Bytes p, uint8_t* out, Change change) {
        for (int lane = 0; lane < kPanel; lane += V::kLanes) {
            for (int i = 0; i < 8; ++i) digits<5>(p + 32 + 64 * i, i, 8, lane, out, change);
            for (int i = 0; i < 4; ++i) digits<5>(p + 544 + 64 * i, 40 + i, 4, lane, out, change);
            digits<4>(p + 800, 60, 1, lane, out, change);
            for (int g = 0; g < 8; ++g) Group::store_scale(out + g * Group::kBytes, 0, lane, V::halves(p + 2 * lane));
        }
    }
};

}  // namespace
}  // namespace gemmart::cpu
