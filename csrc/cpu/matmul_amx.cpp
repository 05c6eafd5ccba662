// Matrix products with AMX: whole column groups of 16 tokens are multiplied a tile at a time, the rest as with AVX-512
// VNNI. The integer sums are exact on both ways and the float chain behind them is the same, so the bits are too.
#include "cpu/matmul_avx512.h"

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

// out [16 tokens][16 rows] = a group's activations × weights, or half a group's, by way of sum tile kTile. GCC's intrinsics
// want the numbers of tiles spelled out.
template <int kTile, bool kHalf>
GEMMART_INLINE void multiply_tile(const int8_t* q, Bytes weights, int32_t* out) {
#define GEMMART_MULTIPLY(tile, left, right)     \
    if constexpr (kTile == tile) {              \
        _tile_zero(tile);                       \
        _tile_loadd(left, q, kGroup);           \
        _tile_loadd(right, weights, 4 * kPanel); \
        _tile_dpbssd(tile, left, right);        \
        _tile_stored(tile, out, 4 * kPanel);    \
    }
    if constexpr (kHalf) {
        GEMMART_MULTIPLY(0, 6, 7)
        GEMMART_MULTIPLY(1, 6, 7)
        GEMMART_MULTIPLY(2, 6, 7)
        GEMMART_MULTIPLY(3, 6, 7)
    } else {
        GEMMART_MULTIPLY(0, 4, 5)
        GEMMART_MULTIPLY(1, 4, 5)
        GEMMART_MULTIPLY(2, 4, 5)
        GEMMART_MULTIPLY(3, 4, 5)
    }
#undef GEMMART_MULTIPLY
}

// A panel whose groups are unpacked with signed bytes, n_groups of them, times a column group of 16. The tiles of the
// next groups are under way while the sums of one are scaled and added.
template <typename Group>
void multiply_panel(Bytes panel, int n_groups, const ActivationArrays& x, const Target& to) {
    using V = Avx512;
    constexpr int kParts = Group::kParts, kTiles = 4 / kParts;  // groups that are under way
    alignas(64) int32_t dots[4][16 * kPanel];
    __m512 sum[16];
    unroll<16>([&](auto c) __attribute__((always_inline)) { sum[c.value] = load_sum<V>(to, c.value, 0); });
    const auto begin = [&](auto slot, int g) __attribute__((always_inline)) {
        const int8_t* q = x.q + g * kGroup * 16;
        const Bytes weights = panel + g * Group::kBytes;
        unroll<kParts>([&](auto part) __attribute__((always_inline)) {
            constexpr int kPart = decltype(part)::value, kTile = decltype(slot)::value * kParts + kPart;
            multiply_tile<kTile, kParts == 2>(q + kPart * kGroup / 2, weights + kPart * kGroup / 2 * kPanel,
                                              dots[kTile]);
        });
    };
    const auto finish = [&](auto slot, int g) __attribute__((always_inline)) {
        constexpr int kSlot = decltype(slot)::value;
        Scales<V, kParts> scales;
        Group::scales(panel + g * Group::kBytes, 0, scales);
        const float* d = x.d + g * 16;
        const float* ds = (kParts == 1 ? x.ds32 : x.ds16) + g * kParts * 16;
        unroll<16>([&](auto c) __attribute__((always_inline)) {
            constexpr int kC = decltype(c)::value;
            const auto dot = [&](int part) __attribute__((always_inline)) {
                return _mm512_cvtepi32_ps(_mm512_load_si512(dots[kSlot * kParts + part] + kC * kPanel));
            };
            __m512 t = V::mul(scales.scale[0], dot(0));
            if constexpr (kParts == 2) t = V::fma(scales.scale[1], dot(1), t);
            sum[kC] = V::fma(t, V::broadcast(d + kC), sum[kC]);
            if constexpr (Group::kOffset)
                unroll<kParts>([&](auto part) __attribute__((always_inline)) {
                    constexpr int kPart = decltype(part)::value;
                    sum[kC] = V::fnma(scales.offset[kPart], V::broadcast(ds + kPart * 16 + kC), sum[kC]);
                });
        });
    };
    const auto each_tile = [&](int g, auto f) __attribute__((always_inline)) {
        unroll<kTiles>([&](auto slot) __attribute__((always_inline)) {
            if (g + slot.value < n_groups) f(slot, g + slot.value);
        });
    };
    unroll<kTiles / 2>([&](auto slot) __attribute__((always_inline)) {
        if (slot.value < n_groups) begin(slot, slot.value);
    });
    for (int g = 0; g < n_groups; g += kTiles)
        each_tile(g, [&](auto slot, int group) __attribute__((always_inline)) {
            constexpr int kNext = (decltype(slot)::value + kTiles / 2) % kTiles;
            if (group + kTiles / 2 < n_groups) begin(Index<kNext>{}, group + kTiles / 2);
            finish(slot, group);
        });
    unroll<16>([&](auto c) __attribute__((always_inline)) {
        V::store_some(to.out + c.value * to.ld, sum[c.value], to.n_rows);
    });
}

template <typename V, typename Source>
struct AmxColumns {
    static constexpr int kFrom = 32;

    static void matmul(const Matrix& w, const Activations& x, int panel_begin, int panel_end, float* out,
                       size_t ld_out, std::byte* scratch) {
        const Tiles tiles;
        const int n_whole = x.n_tokens / 16 * 16;
        const auto without_bias = [](auto u) { return V::sub_bytes(u, _mm512_set1_epi8(static_cast<char>(Source::kBias))); };
        each_unpacked<V, Source>(w, panel_begin, panel_end, scratch, without_bias, [&](const Span& span) {
            for (int begin = 0; begin < n_whole; begin += 16) {
                const ActivationArrays group =
                    arrays_at(x.data, static_cast<size_t>(begin) * x.n_cols + static_cast<size_t>(span.k0) * 16);
                for (int i = 0; i < span.n_panels; ++i) {
                    const int row = span.row + i * kPanel;
                    multiply_panel<Unpacked<V, Source>>(
                        span.panels + i * span.stride, span.n_cols / kGroup, group,
                        {out + begin * ld_out + row, ld_out, span.n_rows - row, span.k0 > 0 || x.go_on});
                }
            }
        });
        multiply_few<V, Source>(w, x, n_whole, panel_begin, panel_end, out, ld_out, scratch);
    }
};

}  // namespace

void fill_matmul_amx(Kernels& k) { k.matmul = matmul_x86<Avx512, AmxColumns>; }

}  // namespace gemmart::cpu
