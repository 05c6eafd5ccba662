// Matrix products for the x86 ISAs, written once over a vector type V, which the ISA's file defines with its
// intrinsics. Everything is in an unnamed namespace: each ISA compiles its own copy.
//
// A tile is a panel × C columns of one column group (of floats and of what stands in a cache V::kLanes rows), its
// sums in registers. It reads the packed blocks, however many columns there are: bytes, scales and offsets are unpacked
// in registers beside the multiplications, which hides most of the cost for eight columns already, and each sum is the
// same chain of operations in every call.
//
// V has
//   kLanes; kTile, columns that the registers hold; kUnpackFrom, columns that are worth unpacking a panel (measured)
//   F, B: kLanes floats, kLanes × 4 bytes
//   set, broadcast, load, load_some, store_some (the first n), load_bytes, lane_bytes (a byte a lane)
//   mul, add, fma (a · b + c), fnma (c − a · b)
//   kFreePowers: whether to multiply by powers of 2 costs nothing: significand(d) and times_power(t, exponent)
//   halves, bfloat16 (the even or odd ones of pairs), from_u8, from_s8: to floats
//   low_nibble, high_nibble, two_bits, with_bit, with_bits45, look_up, store_bytes: the bytes of a slot
//   signed_bytes, kSignedBias: int8 weights as what Dot<8> takes, and the number that this adds to each
//   Dot<bits>: integer sums of weights of so many bits: begin<bias>(−Σ v), then add<s>(u, q) takes slots in order, from
//   0; add(other), add_256_times(other)
#pragma once

#include <type_traits>

#include "cpu/matmul_sources.h"

namespace gemmart::cpu {
namespace {

// ---- Tiles

// P panels of `stride` bytes, of which the first `n_rows` rows exist: their sums in `out`, from zero or going on.
struct Target {
    float* out;
    size_t ld;
    int n_rows;
    bool go_on;
};

template <typename V>
GEMMART_INLINE typename V::F load_sum(const Target& to, int c, int row) {
    return to.go_on ? V::load_some(to.out + c * to.ld + row, to.n_rows - row) : V::set(0);
}

// Whether an activation's scale d is used as significand and power of 2 where groups have so many scales: the
// significand is taken into the weight's scale, from a table where this is unpacked, and to multiply by the power costs
// nothing beside the dot products. A table of two scales a group would be too large.
template <typename V, int Parts>
constexpr bool kSplitsScales = V::kFreePowers && Parts == 1;
template <typename Source>
constexpr bool kFromTable = requires { Source::kTable; };
template <typename Source>
constexpr bool kInCache = requires { Source::kInCache; };

// Whether a tile of C columns fetches weights into L2: the more it multiplies, the later it asks for the next ones.
// Little and even work is left to the hardware, which reads ahead better.
constexpr int kAhead = 8192;  // bytes between what is used and what is fetched
template <typename Source, int C>
constexpr bool kFetches = !kInCache<Source> && (Source::kColumns > kGroup || C > 2);

// kTerms: of the activations.
template <typename V, typename Source, int kTerms, int W, int C>
struct IntegerSums {
    static constexpr int kPanels = 1, kMost = V::kTile / kTerms;
    static constexpr int kRows = kInCache<Source> ? V::kLanes : kPanel;  // what comes from memory is read once
    static constexpr int kVectors = kRows / V::kLanes;
    static constexpr int kGroups = Source::kColumns / kGroup, kParts = Source::kParts;
    // One column is short of independent work.
    static constexpr int kChains = kParts == 1 && C * kTerms <= 2 ? 2 : 1;

    static void multiply(Bytes panel, size_t, int n_cols, const ActivationArrays& x, int column, const Target& to,
                         int lane) {
        typename V::F sum[kVectors][C];
        unroll<kVectors * C>([&](auto i) __attribute__((always_inline)) {
            constexpr int kVector = decltype(i)::value / C, kC = decltype(i)::value % C;
            sum[kVector][kC] = load_sum<V>(to, kC, lane + kVector * V::kLanes);
        });
        ActivationArrays at = arrays_from(x, column);
        for (int k = 0; k < n_cols; k += Source::kColumns, panel += Source::kBytes) {
            unroll<kVectors>([&](auto vector) __attribute__((always_inline)) {
                add_block(panel, lane + vector.value * V::kLanes, at, sum[vector.value]);
            });
            at = arrays_at(at, Source::kColumns * W);
        }
        unroll<kVectors * C>([&](auto i) __attribute__((always_inline)) {
            constexpr int kVector = decltype(i)::value / C, kC = decltype(i)::value % C;
            const int row = lane + kVector * V::kLanes;
            V::store_some(to.out + kC * to.ld + row, sum[kVector][kC], to.n_rows - row);
        });
    }

    // What the rows of a block from `lane` on add to their sums.
    static GEMMART_INLINE void add_block(Bytes panel, int lane, const ActivationArrays& x, typename V::F (&sum)[C]) {
        const int8_t* terms[2] = {x.q, x.q_low};
        const float* d = x.d;
        const float* ds = kParts == 1 ? x.ds32 : x.ds16;
        const int32_t* sums = kParts == 1 ? x.s32 : x.s16;
        [[maybe_unused]] const int32_t* significand = x.significand;
        [[maybe_unused]] const float* exponent = x.exponent;
        Scales<V, kGroups * kParts> scales;
        Source::scales(panel, lane, scales);
        for (int turn = 0; turn < kGroups; turn += Source::kTurn)
            unroll<Source::kTurn>([&](auto j) __attribute__((always_inline)) {
                constexpr int J = decltype(j)::value;
                if (kFetches<Source, C> && lane == 0) fetch(panel + kAhead + (turn + J) * kGroupBytes);
                typename V::F t[C];
                unroll<kParts>([&](auto part) __attribute__((always_inline)) {
                    constexpr int kPart = decltype(part)::value, kSlots = 8 / kParts;
                    typename V::template Dot<Source::kBits> dot[kTerms][kChains][C];
                    unroll<C>([&](auto c) __attribute__((always_inline)) {
                        constexpr int kC = decltype(c)::value;
                        dot[kTerms - 1][0][kC].template begin<Source::kBias>(sums + kPart * W + kC);
                        if constexpr (kTerms == 2) dot[0][0][kC].template begin<0>(sums);
                        if constexpr (kChains == 2)
                            unroll<kTerms>([&](auto term) __attribute__((always_inline)) {
                                dot[decltype(term)::value][1][kC].template begin<0>(sums);
                            });
                    });
                    unroll<kSlots>([&](auto s) __attribute__((always_inline)) {
                        constexpr int S = decltype(s)::value;
                        const auto u = Source::template slot<J, kPart * kSlots + S>(panel, turn + J, lane);
                        unroll<kTerms * C>([&](auto i) __attribute__((always_inline)) {
                            constexpr int kTerm = decltype(i)::value / C, kC = decltype(i)::value % C;
                            dot[kTerm][S % kChains][kC].template add<S / kChains>(
                                u, terms[kTerm] + kC * kGroup + (kPart * kSlots + S) * 4);
                        });
                    });
                    const auto scale = [&](int c) __attribute__((always_inline)) {
                        const auto weight_scale = scales.scale[(turn + J) * kParts + kPart];
                        if constexpr (kFromTable<Source>)
                            return Source::scale(panel, significand[c]);
                        else if constexpr (kSplitsScales<V, kParts>)
                            return V::mul(weight_scale, V::significand(d + c));
                        else
                            return weight_scale;
                    };
                    unroll<C>([&](auto c) __attribute__((always_inline)) {
                        constexpr int kC = decltype(c)::value;
                        if constexpr (kChains == 2)
                            unroll<kTerms>([&](auto term) __attribute__((always_inline)) {
                                dot[decltype(term)::value][0][kC].add(dot[decltype(term)::value][1][kC]);
                            });
                        auto& last = dot[kTerms - 1][0][kC];
                        if constexpr (kTerms == 2) last.add_256_times(dot[0][0][kC]);
                        const auto value = last.sum();
                        t[kC] = kPart ? V::fma(scale(kC), value, t[kC]) : V::mul(scale(kC), value);
                    });
                });
                unroll<C>([&](auto c) __attribute__((always_inline)) {
                    constexpr int kC = decltype(c)::value;
                    if constexpr (kSplitsScales<V, kParts>)
                        sum[kC] = V::add(sum[kC], V::times_power(t[kC], exponent + kC));
                    else
                        sum[kC] = V::fma(t[kC], V::broadcast(d + kC), sum[kC]);
                    if constexpr (Source::kOffset)
                        unroll<kParts>([&](auto part) __attribute__((always_inline)) {
                            constexpr int kPart = decltype(part)::value;
                            sum[kC] = V::fnma(scales.offset[(turn + J) * kParts + kPart],
                                              V::broadcast(ds + kPart * W + kC), sum[kC]);
                        });
                });
                unroll<kTerms>([&](auto term) __attribute__((always_inline)) { terms[term.value] += kGroup * W; });
                d += W, ds += kParts * W, sums += kParts * W;
                significand += W, exponent += W;
            });
    }

    static constexpr int kGroupBytes = Source::kBytes / kGroups;
    static GEMMART_INLINE void fetch(Bytes p) {
        for (int i = 0; i < kGroupBytes; i += 64) _mm_prefetch(p + i, _MM_HINT_T1);
    }
};

template <typename V, typename Source, int W, int C>
using IntegerTile = IntegerSums<V, Source, 1, W, C>;
template <typename V, typename Source, int W, int C>
using TwoTermTile = IntegerSums<V, Source, 2, W, C>;

template <typename V, typename Source, int W, int C>
struct FloatTile {
    static constexpr int kMost = V::kTile, kRows = V::kLanes;
    static constexpr int kPanels = C < 4 ? 4 / C : 1;  // chains enough for the latency of a multiplication

    template <int P, typename F>  // f(panel, column)
    static GEMMART_INLINE void each(F f) {
        unroll<P * C>([&](auto i) __attribute__((always_inline)) {
            f(Index<decltype(i)::value / C>{}, Index<decltype(i)::value % C>{});
        });
    }

    template <int P = kPanels>
    static void multiply(Bytes panel, size_t stride, int n_cols, const ActivationArrays& activations, int column,
                         const Target& to, int lane) {
        const float* x = activations.x + column;
        typename V::F sum[P][C];
        each<P>([&](auto p, auto c) __attribute__((always_inline)) {
            sum[p.value][c.value] = load_sum<V>(to, c.value, p.value * kPanel + lane);
        });
        for (int k = 0; k < n_cols; k += kGroup) {
            typename V::F part[P][C];
            each<P>([&](auto p, auto c) __attribute__((always_inline)) { part[p.value][c.value] = V::set(0); });
            for (int i = k; i < k + kGroup; i += 2)
                unroll<2>([&](auto odd) __attribute__((always_inline)) {
                    unroll<P>([&](auto p) __attribute__((always_inline)) {
                        const auto w = Source::template load<odd.value>(panel + p.value * stride, i + odd.value, lane);
                        unroll<C>([&](auto c) __attribute__((always_inline)) {
                            part[p.value][c.value] =
                                V::fma(w, V::broadcast(x + (i + odd.value) * W + c.value), part[p.value][c.value]);
                        });
                    });
                });
            each<P>([&](auto p, auto c) __attribute__((always_inline)) {
                sum[p.value][c.value] = V::add(sum[p.value][c.value], part[p.value][c.value]);
            });
        }
        each<P>([&](auto p, auto c) __attribute__((always_inline)) {
            const int row = p.value * kPanel + lane;
            V::store_some(to.out + c.value * to.ld + row, sum[p.value][c.value], to.n_rows - row);
        });
    }
};

// ---- Drivers

// Columns [k0, k0 + n_cols) of consecutive panels, whose first row is `row`.
struct Span {
    Bytes panels;
    size_t stride;
    int n_panels, row, n_rows, k0, n_cols;
};

// The column group of width W that begins at `begin`.
template <typename V, template <typename, typename, int, int> typename Tile, typename Source, int W>
void multiply_group(const Span& w, const Activations& x, int begin, float* out, size_t ld_out) {
    constexpr int kMost = Tile<V, Source, W, 1>::kMost, C = W < kMost ? W : kMost;
    using T = Tile<V, Source, W, C>;
    const ActivationArrays group =
        arrays_at(x.data, static_cast<size_t>(begin) * x.n_cols + static_cast<size_t>(w.k0) * W);
    for (int c = 0; c < W; c += C) {
        for (int panel = 0; panel < w.n_panels;) {
            const Bytes p = w.panels + panel * w.stride;
            const int row = w.row + panel * kPanel;
            const Target to{out + (begin + c) * ld_out + row, ld_out, w.n_rows - row, w.k0 > 0};
            if (to.go_on)  // the sums of the next tile
                for (int i = C; i < 2 * C; ++i) _mm_prefetch(to.out + i * ld_out, _MM_HINT_T0);
            const bool whole = w.n_panels - panel >= T::kPanels;
            for (int lane = 0; lane < kPanel; lane += T::kRows) {
                if constexpr (T::kPanels == 1)
                    T::multiply(p, w.stride, w.n_cols, group, c, to, lane);
                else if (whole)
                    T::multiply(p, w.stride, w.n_cols, group, c, to, lane);
                else
                    T::template multiply<1>(p, w.stride, w.n_cols, group, c, to, lane);
            }
            panel += whole ? T::kPanels : 1;
        }
    }
}

// Column groups of full width, and the rest.
template <typename V, template <typename, typename, int, int> typename Tile, typename Source>
void multiply(const Span& w, const Activations& x, int begin, float* out, size_t ld_out) {
    for (int width; begin < x.n_tokens; begin += width) {
        width = column_group_width(x.n_tokens - begin);
        auto* group = width == 16  ? multiply_group<V, Tile, Source, 16>
                      : width == 8 ? multiply_group<V, Tile, Source, 8>
                      : width == 4 ? multiply_group<V, Tile, Source, 4>
                      : width == 2 ? multiply_group<V, Tile, Source, 2>
                                   : multiply_group<V, Tile, Source, 1>;
        group(w, x, begin, out, ld_out);
    }
}

template <typename V, typename Source>
void multiply_integers(const Span& w, const Activations& x, int begin, float* out, size_t ld_out) {
    auto* tiles = x.data.q_low ? multiply<V, TwoTermTile, Source> : multiply<V, IntegerTile, Source>;
    tiles(w, x, begin, out, ld_out);
}

static int least(int a, int b) { return a < b ? a : b; }

constexpr int kBlockPanels = 4;  // panels that stay in L2 while the column groups pass

// multiply(span) for each block of panels.
template <typename Multiply>
void each_block(const Matrix& w, int panel_begin, int panel_end, Multiply multiply) {
    for (int panel = panel_begin; panel < panel_end; panel += kBlockPanels)
        multiply(Span{reinterpret_cast<Bytes>(w.data) + panel * w.stride, w.stride,
                      least(kBlockPanels, panel_end - panel), panel * kPanel, w.n_rows, 0, w.n_cols});
}

template <typename V, typename Source>
void matmul_floats(const Matrix& w, const Activations& x, int panel_begin, int panel_end, float* out, size_t ld_out,
                   std::byte*) {
    each_block(w, panel_begin, panel_end,
               [&](const Span& span) { multiply<V, FloatTile, Source>(span, x, 0, out, ld_out); });
}

// ---- Unpacked groups

// A group with its bytes, scales and offsets unpacked, a source for the tiles. Where V splits the scales of
// activations, each scale stands there times every significand.
template <typename V, int Parts, int Bits, int Bias, bool Offset>
struct UnpackedGroup {
    static constexpr bool kInCache = true;
    static constexpr int kColumns = kGroup, kTurn = 1, kParts = Parts, kBits = Bits, kBias = Bias;
    static constexpr int kScales = kSplitsScales<V, Parts> ? kSignificands : 1;
    static constexpr bool kOffset = Offset;
    static constexpr int kBytes = (kGroup + kParts * (kScales + kOffset) * static_cast<int>(sizeof(float))) * kPanel;
    template <int, int S>
    static GEMMART_INLINE typename V::B slot(Bytes p, int, int lane) {
        return V::load_bytes(p + 64 * S + 4 * lane);
    }
    static GEMMART_INLINE void scales(Bytes p, int lane, Scales<V, kParts>& out) {
        for (int i = 0; i < kParts; ++i) {
            if constexpr (kScales == 1) out.scale[i] = V::load(number(p, i) + lane);
            if constexpr (kOffset) out.offset[i] = V::load(number(p, kScales * kParts + i) + lane);
        }
    }

    static GEMMART_INLINE void store_slot(uint8_t* group, int s, int lane, typename V::B u) {
        V::store_bytes(group + 64 * s + 4 * lane, u);
    }
    static GEMMART_INLINE void store_scale(uint8_t* group, int part, int lane, typename V::F scale) {
        for (int i = 0; i < kScales; ++i)
            V::store(number(group, i * kParts + part) + lane,
                     V::mul(scale, V::set(1 + static_cast<float>(i) / kSignificands)));
    }
    static GEMMART_INLINE void store_offset(uint8_t* group, int part, int lane, typename V::F offset) {
        V::store(number(group, kScales * kParts + part) + lane, offset);
    }

  protected:
    template <typename Byte>
    static GEMMART_INLINE auto* number(Byte* group, int i) {
        using Float = std::conditional_t<std::is_const_v<Byte>, const float, float>;
        return reinterpret_cast<Float*>(group + kGroup * kPanel) + i * kPanel;
    }
};

template <typename V, int Bits, int Bias, bool Offset>
struct TabledGroup : UnpackedGroup<V, 1, Bits, Bias, Offset> {
    static constexpr bool kTable = true;
    static GEMMART_INLINE typename V::F scale(Bytes p, int significand) {
        return V::load(TabledGroup::number(p, significand));
    }
};

// Those of a source.
template <typename V, typename Source>
using Unpacked =
    std::conditional_t<kSplitsScales<V, Source::kParts>, TabledGroup<V, Source::kBits, Source::kBias, Source::kOffset>,
                       UnpackedGroup<V, Source::kParts, Source::kBits, Source::kBias, Source::kOffset>>;

// Those of matmul_unpacked.h have no slots: they unpack whole blocks into groups.
template <typename Source>
constexpr bool kUnpacksBlocks = requires { typename Source::Group; };

// n_cols columns of a panel; `change` is applied to the bytes of each slot.
template <typename V, typename Source, typename Change>
GEMMART_INLINE void unpack(Bytes panel, int n_cols, uint8_t* to, Change change) {
    using Group = Unpacked<V, Source>;
    constexpr int kGroups = Source::kColumns / kGroup;
    for (int k = 0; k < n_cols; k += Source::kColumns, panel += Source::kBytes, to += kGroups * Group::kBytes) {
        if constexpr (kUnpacksBlocks<Source>) {
            Source::unpack(panel, to, change);
        } else {
            for (int lane = 0; lane < kPanel; lane += V::kLanes) {
                Scales<V, kGroups * Source::kParts> scales;
                Source::scales(panel, lane, scales);
                for (int turn = 0; turn < kGroups; turn += Source::kTurn)
                    unroll<Source::kTurn>([&](auto j) __attribute__((always_inline)) {
                        constexpr int J = decltype(j)::value;
                        uint8_t* group = to + (turn + J) * Group::kBytes;
                        unroll<8>([&](auto s) __attribute__((always_inline)) {
                            constexpr int S = decltype(s)::value;
                            Group::store_slot(group, S, lane,
                                              change(Source::template slot<J, S>(panel, turn + J, lane)));
                        });
                        for (int i = 0; i < Source::kParts; ++i) {
                            const int part = (turn + J) * Source::kParts + i;
                            Group::store_scale(group, i, lane, scales.scale[part]);
                            if constexpr (Source::kOffset) Group::store_offset(group, i, lane, scales.offset[part]);
                        }
                    });
            }
        }
    }
}

// Panels unpacked into scratch, kPanels at a time, a run of columns that fits into kRoom bytes: multiply(span).
template <typename V, typename Source, int kPanels, int kRoom, typename Change, typename Multiply>
void each_unpacked(const Matrix& w, int panel_begin, int panel_end, std::byte* scratch, Change change,
                   Multiply multiply) {
    using Group = Unpacked<V, Source>;
    constexpr int kMost = kRoom / kPanels / (Group::kBytes / kGroup * Source::kColumns);  // blocks
    static_assert(kMost >= 1 && kRoom <= static_cast<int>(kScratchBytes));
    const int n_blocks = w.n_cols / Source::kColumns, n_runs = (n_blocks + kMost - 1) / kMost;
    const int run = (n_blocks + n_runs - 1) / n_runs * Source::kColumns;
    auto* unpacked = reinterpret_cast<uint8_t*>(scratch);
    for (int panel = panel_begin; panel < panel_end; panel += kPanels) {
        const int n_panels = least(kPanels, panel_end - panel);
        for (int k = 0; k < w.n_cols; k += run) {
            const int n_cols = least(run, w.n_cols - k);
            const size_t stride = static_cast<size_t>(n_cols) / kGroup * Group::kBytes;
            const auto* from = reinterpret_cast<Bytes>(w.data) + k / Source::kColumns * Source::kBytes;
            for (int i = 0; i < n_panels; ++i)
                unpack<V, Source>(from + (panel + i) * w.stride, n_cols, unpacked + i * stride, change);
            multiply(Span{unpacked, stride, n_panels, panel * kPanel, w.n_rows, k, n_cols});
        }
    }
}

// A panel in L1, where to unpack is most of the work; several in L2, where all column groups pass over them.
constexpr int kFewPanels = 1, kFewRoom = 24 << 10, kManyPanels = 4, kManyRoom = 512 << 10;

// Integer products with few columns, from `begin` on.
template <typename V, typename Source>
void multiply_few(const Matrix& w, const Activations& x, int begin, int panel_begin, int panel_end, float* out,
                  size_t ld_out, std::byte* scratch) {
    if constexpr (kUnpacksBlocks<Source>)
        each_unpacked<V, Source, kFewPanels, kFewRoom>(
            w, panel_begin, panel_end, scratch, [](auto u) { return u; },
            [&](const Span& span) { multiply_integers<V, Unpacked<V, Source>>(span, x, begin, out, ld_out); });
    else
        each_block(w, panel_begin, panel_end,
                   [&](const Span& span) { multiply_integers<V, Source>(span, x, begin, out, ld_out); });
}

template <typename V, typename Source>
void matmul_few(const Matrix& w, const Activations& x, int panel_begin, int panel_end, float* out, size_t ld_out,
                std::byte* scratch) {
    multiply_few<V, Source>(w, x, 0, panel_begin, panel_end, out, ld_out, scratch);
}

// Integer products with so many columns that each panel is unpacked once for all of them.
template <typename V, typename Source>
struct ManyColumns {
    static constexpr int kFrom = V::kUnpackFrom;

    static void matmul(const Matrix& w, const Activations& x, int panel_begin, int panel_end, float* out, size_t ld_out,
                       std::byte* scratch) {
        each_unpacked<V, Source, kManyPanels, kManyRoom>(
            w, panel_begin, panel_end, scratch, [](auto u) { return u; },
            [&](const Span& span) { multiply_integers<V, Unpacked<V, Source>>(span, x, 0, out, ld_out); });
    }
};

// out [n_cols][16] <- 4 rows [n_cols] of `stride` floats
inline void transpose_rows(const float* rows, int stride, int n_cols, float* out) {
    for (int k = 0; k < n_cols; k += 4) {
        __m128 a = _mm_loadu_ps(rows + k), b = _mm_loadu_ps(rows + stride + k);
        __m128 c = _mm_loadu_ps(rows + 2 * stride + k), d = _mm_loadu_ps(rows + 3 * stride + k);
        _MM_TRANSPOSE4_PS(a, b, c, d);
        _mm_storeu_ps(out + k * kPanel, a), _mm_storeu_ps(out + (k + 1) * kPanel, b);
        _mm_storeu_ps(out + (k + 2) * kPanel, c), _mm_storeu_ps(out + (k + 3) * kPanel, d);
    }
}

// Rows as in the file: decoded to F32 panels, once for all columns of x.
template <typename V>
void matmul_rows(const Matrix& w, const Activations& x, int panel_begin, int panel_end, float* out, size_t ld_out,
                 std::byte* scratch) {
    const FormatInfo& format = format_of(w.dtype);
    constexpr int kChunk = 1024, kStride = kChunk * kPanel;
    auto* panels = reinterpret_cast<float*>(scratch);
    float* rows = panels + kBlockPanels * kStride;  // 4 rows of a chunk
    for (int panel = panel_begin; panel < panel_end; panel += kBlockPanels) {
        const int n_panels = least(kBlockPanels, panel_end - panel);
        for (int k = 0; k < w.n_cols; k += kChunk) {
            const int n_cols = least(kChunk, w.n_cols - k);
            const size_t at = static_cast<size_t>(k / format.block_size) * format.block_bytes;
            for (int i = 0; i < n_panels * kPanel; i += 4) {
                for (int r = 0; r < 4; ++r) {  // rows beyond the last one are decoded again and not stored
                    const int row = least(panel * kPanel + i + r, w.n_rows - 1);
                    format.decode(w.data + row * w.stride + at, rows + r * n_cols, n_cols);
                }
                transpose_rows(rows, n_cols, n_cols, panels + i / kPanel * kStride + i % kPanel);
            }
            multiply<V, FloatTile, F32<V>>({reinterpret_cast<Bytes>(panels), kStride * sizeof(float), n_panels,
                                            panel * kPanel, w.n_rows, k, n_cols},
                                           x, 0, out, ld_out);
        }
    }
}

}  // namespace
}  // namespace gemmart::cpu

#include "cpu/matmul_unpacked.h"

namespace gemmart::cpu {
namespace {

// Many<V, Source>: integer products of Many::kFrom columns and more.
template <typename V, template <typename, typename> typename Many, typename Source>
auto* integers(int n_tokens) {
    return n_tokens < Many<V, Source>::kFrom ? matmul_few<V, Source> : Many<V, Source>::matmul;
}

template <typename V, template <typename, typename> typename Many>
void matmul_x86(const Matrix& w, const Activations& x, int panel_begin, int panel_end, float* out, size_t ld_out,
                std::byte* scratch) {
    const int n = x.n_tokens;
    auto* multiply = !w.packed                   ? matmul_rows<V>
                     : w.dtype == DType::Q4_0    ? integers<V, Many, Q4_0<V>>(n)
                     : w.dtype == DType::Q4_1    ? integers<V, Many, Q4_1<V>>(n)
                     : w.dtype == DType::Q5_0    ? integers<V, Many, Q5_0<V>>(n)
                     : w.dtype == DType::Q5_1    ? integers<V, Many, Q5_1<V>>(n)
                     : w.dtype == DType::Q2_K    ? integers<V, Many, Q2_K<V>>(n)
                     : w.dtype == DType::Q3_K    ? integers<V, Many, Q3_K<V>>(n)
                     : w.dtype == DType::Q8_0    ? integers<V, Many, Q8_0<V>>(n)
                     : w.dtype == DType::IQ4_NL  ? integers<V, Many, IQ4_NL<V>>(n)
                     : w.dtype == DType::IQ4_XS  ? integers<V, Many, IQ4_XS<V>>(n)
                     : w.dtype == DType::Q4_K    ? integers<V, Many, Q4_K<V>>(n)
                     : w.dtype == DType::Q5_K    ? integers<V, Many, Q5_K<V>>(n)
                     : w.dtype == DType::Q6_K    ? integers<V, Many, Q6_K<V>>(n)
                     : w.dtype == DType::IQ1_S   ? integers<V, Many, IQ1_S<V>>(n)
                     : w.dtype == DType::IQ1_M   ? integers<V, Many, IQ1_M<V>>(n)
                     : w.dtype == DType::IQ2_XXS ? integers<V, Many, IQ2_XXS<V>>(n)
                     : w.dtype == DType::IQ2_XS  ? integers<V, Many, IQ2_XS<V>>(n)
                     : w.dtype == DType::IQ2_S   ? integers<V, Many, IQ2_S<V>>(n)
                     : w.dtype == DType::IQ3_XXS ? integers<V, Many, IQ3_XXS<V>>(n)
                     : w.dtype == DType::IQ3_S   ? integers<V, Many, IQ3_S<V>>(n)
                     : w.dtype == DType::TQ1_0   ? integers<V, Many, TQ1_0<V>>(n)
                     : w.dtype == DType::TQ2_0   ? integers<V, Many, TQ2_0<V>>(n)
                     : w.dtype == DType::MXFP4   ? integers<V, Many, MXFP4<V>>(n)
                     : w.dtype == DType::F32     ? matmul_floats<V, F32<V>>
                     : w.dtype == DType::F16     ? matmul_floats<V, F16<V>>
                                                 : matmul_floats<V, BF16<V>>;
    multiply(w, x, panel_begin, panel_end, out, ld_out, scratch);
}

}  // namespace
}  // namespace gemmart::cpu
