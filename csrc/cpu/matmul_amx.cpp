// Matrix products with AMX. Of integer formats whole column groups of 16 tokens are multiplied a tile at a time, the
// rest as with AVX-512 VNNI: the integer sums are exact on both ways and the float chain behind them is the same, so
// the bits are too. BF16 goes through tiles always; F16 and F32 as with AVX-512.
#include "cpu/matmul_amx_bf16.h"

namespace gemmart::cpu {
namespace {

// What ldtilecfg reads. Tiles 0-3 take sums [16 tokens][16 rows]; 4 and 5 activations [16 tokens][32 columns] and
// weights [8 slots][16 rows][4 columns] of a group, 6 and 7 those of half a group.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 32, 64, 16, 64};
    uint8_t n_rows[16] = {16, 16, 16, 16, 16, 8, 16, 4};
};

// The tiles belong to this thread while the object lives.
struct Tiles {
    Tiles() {
        static constexpr TileConfig kConfig;
        _tile_loadconfig(&kConfig);
    }
    ~Tiles() { _tile_release(); }
};

// out [16 tokens][16 rows] = a group's activations × weights, or half a group's, by way of sum tile kTile. In
// assembler, because GCC's intrinsics clobber all memory, and with it the sums that stand in registers.
template <int kTile, bool kHalf>
GEMMART_INLINE void multiply_tile(const int8_t* q, Bytes weights, int32_t* out) {
    constexpr int kLeft = kHalf ? 6 : 4, kRight = kLeft + 1, kColumns = kHalf ? kGroup / 2 : kGroup;
    using Left = const int8_t[15 * kGroup + kColumns];
    using Right = const uint8_t[kColumns * kPanel];
    using Sums = int32_t[16 * kPanel];
    const long left_stride = kGroup, stride = 4 * kPanel;
    __asm__ volatile(
        "tilezero %%tmm%c[tile]\n\t"
        "tileloadd (%[q],%[left_stride],1), %%tmm%c[left]\n\t"
        "tileloadd (%[weights],%[stride],1), %%tmm%c[right]\n\t"
        "tdpbssd %%tmm%c[right], %%tmm%c[left], %%tmm%c[tile]\n\t"
        "tilestored %%tmm%c[tile], (%[out],%[stride],1)"
        : "=m"(*reinterpret_cast<Sums*>(out))
        : [q] "r"(q), [weights] "r"(weights), [out] "r"(out), [left_stride] "r"(left_stride), [stride] "r"(stride),
          [tile] "i"(kTile), [left] "i"(kLeft), [right] "i"(kRight), "m"(*reinterpret_cast<Left*>(q)),
          "m"(*reinterpret_cast<Right*>(weights)));
}

// A panel whose groups are unpacked with signed bytes, n_groups of them, times a column group of 16. Four tiles of sums
// are under way: those of the next groups are computed while one is scaled and added.
template <typename Group, int kTerms>
struct AmxPanel {
    using V = Avx512;
    static constexpr int kParts = Group::kParts, kSlots = 4 / kParts;  // groups under way

    Bytes panel;
    int n_groups;
    const ActivationArrays& x;
    int32_t (*dots)[4][16 * kPanel];  // of each term the four tiles

    template <int Slot>
    GEMMART_INLINE void begin(int g) {
        if (g >= n_groups) return;
        const Bytes weights = panel + g * Group::kBytes;
        for (int term = 0; term < kTerms; ++term) {
            const int8_t* q = (term ? x.q_low : x.q) + g * kGroup * 16;
            multiply_tile<Slot * kParts, kParts == 2>(q, weights, dots[term][Slot * kParts]);
            if constexpr (kParts == 2)
                multiply_tile<Slot * kParts + 1, true>(q + kGroup / 2, weights + kGroup / 2 * kPanel,
                                                       dots[term][Slot * kParts + 1]);
        }
    }

    template <int Slot>
    GEMMART_INLINE void finish(int g, __m512 (&sum)[16]) const {
        if (g >= n_groups) return;
        const Bytes weights = panel + g * Group::kBytes;
        Scales<V, kParts> scales;
        Group::scales(weights, 0, scales);
        const float* ds = (kParts == 1 ? x.ds32 : x.ds16) + g * kParts * 16;
#pragma GCC unroll 16
        for (int c = 0; c < 16; ++c) {
            if constexpr (kFromTable<Group>) {
                const __m512 t = V::mul(Group::scale(weights, x.significand[g * 16 + c]), dot<Slot>(c));
                sum[c] = V::add(sum[c], V::times_power(t, x.exponent + g * 16 + c));
            } else {
                const __m512 t = V::mul(scales.scale[0], dot<Slot * kParts>(c));
                sum[c] = V::fma(V::fma(scales.scale[kParts - 1], dot<Slot * kParts + kParts - 1>(c), t),
                                V::broadcast(x.d + g * 16 + c), sum[c]);
            }
            if constexpr (Group::kOffset) sum[c] = V::fnma(scales.offset[0], V::broadcast(ds + c), sum[c]);
            if constexpr (Group::kOffset && kParts == 2)
                sum[c] = V::fnma(scales.offset[1], V::broadcast(ds + 16 + c), sum[c]);
        }
    }

    template <int Tile>
    GEMMART_INLINE __m512 dot(int c) const {
        const __m512i first = _mm512_load_si512(dots[0][Tile] + c * kPanel);
        if constexpr (kTerms == 1) return _mm512_cvtepi32_ps(first);
        const __m512i low = _mm512_load_si512(dots[kTerms - 1][Tile] + c * kPanel);
        return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(first, 8), low));
    }

    void multiply(const Target& to) {
        __m512 sum[16];
#pragma GCC unroll 16
        for (int c = 0; c < 16; ++c) sum[c] = load_sum<V>(to, c, 0);
        if constexpr (kParts == 1) {
            begin<0>(0), begin<1>(1);
            for (int g = 0; g < n_groups; g += 4) {
                begin<2>(g + 2), finish<0>(g, sum);
                begin<3>(g + 3), finish<1>(g + 1, sum);
                begin<0>(g + 4), finish<2>(g + 2, sum);
                begin<1>(g + 5), finish<3>(g + 3, sum);
            }
        } else {
            begin<0>(0);
            for (int g = 0; g < n_groups; g += 2) {
                begin<1>(g + 1), finish<0>(g, sum);
                begin<0>(g + 2), finish<1>(g + 1, sum);
            }
        }
#pragma GCC unroll 16
        for (int c = 0; c < 16; ++c) V::store_some(to.out + c * to.ld, sum[c], to.n_rows);
    }
};

template <typename V, typename Source>
struct AmxColumns {
    static constexpr int kFrom = 32;

    static void matmul(const Matrix& w, const Activations& x, int panel_begin, int panel_end, float* out, size_t ld_out,
                       std::byte* scratch) {
        const Tiles tiles;
        const auto without_bias = [](auto u) {
            return V::sub_bytes(u, _mm512_set1_epi8(static_cast<char>(Source::kBias)));
        };
        each_unpacked<V, Source, kManyPanels, kManyRoom>(
            w, panel_begin, panel_end, scratch, without_bias, [&](const Span& span) {
                auto* multiply = x.data.q_low ? whole_groups<2> : whole_groups<1>;
                multiply(span, x, out, ld_out);
            });
        multiply_few<V, Source>(w, x, x.n_tokens / 16 * 16, panel_begin, panel_end, out, ld_out, scratch);
    }

  private:
    template <int kTerms>
    static void whole_groups(const Span& span, const Activations& x, float* out, size_t ld_out) {
        alignas(64) int32_t dots[kTerms][4][16 * kPanel];
        for (int begin = 0; begin + 16 <= x.n_tokens; begin += 16) {
            const ActivationArrays group =
                arrays_at(x.data, static_cast<size_t>(begin) * x.n_cols + static_cast<size_t>(span.k0) * 16);
            for (int i = 0; i < span.n_panels; ++i) {
                const int row = span.row + i * kPanel;
                AmxPanel<Unpacked<V, Source>, kTerms> panel{span.panels + i * span.stride, span.n_cols / kGroup, group,
                                                            dots};
                panel.multiply({out + begin * ld_out + row, ld_out, span.n_rows - row, span.k0 > 0});
            }
        }
    }
};

void matmul(const Matrix& w, const Activations& x, int panel_begin, int panel_end, float* out, size_t ld_out,
            std::byte* scratch) {
    auto* multiply = w.dtype == DType::BF16 ? matmul_bf16 : matmul_x86<Avx512, AmxColumns>;
    multiply(w, x, panel_begin, panel_end, out, ld_out, scratch);
}

}  // namespace

void fill_matmul_amx(Kernels& k) { k.matmul = matmul; }

}  // namespace gemmart::cpu
