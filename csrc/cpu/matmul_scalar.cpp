// Matrix products in plain C++: the truth that every other ISA is compared with. One block of a panel is unpacked at a
// time to bytes, scales and offsets, then multiplied with each column; layout.h and kernels.h state layout and order of
// sums.
#include <cstring>

#include "cpu/tables.h"
#include "formats/grids.h"
#include "formats/iq4_nl.h"
#include "formats/mxfp4.h"

namespace gemmart::cpu {
namespace {

// A block of a panel of an integer format: weight = scale · (u − bias) − offset.
struct Unpacked {
    uint8_t u[kBlock * kPanel];         // [slot][row][4 columns]
    float scale[kBlock / 16][kPanel];   // a group of 32, or a half group of 16 columns
    float offset[kBlock / 16][kPanel];  // of the formats that have one
};

using Bytes = const uint8_t*;

uint8_t nibble(Bytes p, int which) { return which ? *p >> 4 : *p & 15; }
float half_at(Bytes p, int i) {
    uint16_t bits;
    std::memcpy(&bits, p + 2 * i, 2);
    return half_to_float(bits);
}
uint8_t bit_at(Bytes p, int i) { return (p[i / 8] >> (i % 8)) & 1; }

void unpack_q4_0(Bytes p, Unpacked& out) {
    for (int i = 0; i < 512; ++i) out.u[i] = nibble(p + 32 + i % 256, i / 256);
    for (int r = 0; r < kPanel; ++r) out.scale[0][r] = half_at(p, r);
}

void unpack_q4_1(Bytes p, Unpacked& out) {
    for (int i = 0; i < 512; ++i) out.u[i] = nibble(p + 64 + i % 256, i / 256);
    for (int r = 0; r < kPanel; ++r) {
        out.scale[0][r] = half_at(p, r);
        out.offset[0][r] = -half_at(p + 32, r);
    }
}

void unpack_q5_0(Bytes p, Unpacked& out) {
    for (int i = 0; i < 512; ++i) out.u[i] = nibble(p + 96 + i % 256, i / 256) | bit_at(p + 32, i) << 4;
    for (int r = 0; r < kPanel; ++r) out.scale[0][r] = half_at(p, r);
}

void unpack_q5_1(Bytes p, Unpacked& out) {
    for (int i = 0; i < 512; ++i) out.u[i] = nibble(p + 128 + i % 256, i / 256) | bit_at(p + 64, i) << 4;
    for (int r = 0; r < kPanel; ++r) {
        out.scale[0][r] = half_at(p, r);
        out.offset[0][r] = -half_at(p + 32, r);
    }
}

void unpack_q8_0(Bytes p, Unpacked& out) {
    for (int i = 0; i < 512; ++i) out.u[i] = p[32 + i] ^ 0x80;
    for (int r = 0; r < kPanel; ++r) out.scale[0][r] = half_at(p, r);
}

void unpack_iq4_nl(Bytes p, Unpacked& out) {
    for (int i = 0; i < 512; ++i) out.u[i] = kIQ4Levels[nibble(p + 32 + i % 256, i / 256)] + 128;
    for (int r = 0; r < kPanel; ++r) out.scale[0][r] = half_at(p, r);
}

// The six bits of group g, row r
int six_bits(Bytes lo, Bytes hi, int g, int r) {
    return nibble(lo + g / 2 * kPanel + r, g & 1) | ((hi[g / 4 * kPanel + r] >> 2 * (g % 4)) & 3) << 4;
}

int two_bits(Bytes p, int which) { return *p >> 2 * which & 3; }

void unpack_q2_k(Bytes p, Unpacked& out) {
    for (int g = 0; g < 8; ++g)
        for (int i = 0; i < 512; ++i) out.u[512 * g + i] = two_bits(p + 320 + g / 4 * 512 + i, g % 4);
    for (int s = 0; s < 16; ++s)
        for (int r = 0; r < kPanel; ++r) {
            out.scale[s][r] = half_at(p, r) * nibble(p + 64 + s * kPanel + r, 0);
            out.offset[s][r] = half_at(p + 32, r) * nibble(p + 64 + s * kPanel + r, 1);
        }
}

void unpack_q3_k(Bytes p, Unpacked& out) {
    for (int g = 0; g < 8; ++g)
        for (int i = 0; i < 512; ++i)
            out.u[512 * g + i] =
                two_bits(p + 480 + g / 4 * 768 + i, g % 4) | bit_at(p + 224 + g / 4 * 768 + 64 * (g % 4), i) << 2;
    for (int s = 0; s < 16; ++s)
        for (int r = 0; r < kPanel; ++r) {
            const int six = nibble(p + 32 + s % 8 * kPanel + r, s / 8) | two_bits(p + 160 + s % 4 * kPanel + r, s / 4)
                                                                             << 4;
            out.scale[s][r] = half_at(p, r) * (six - 32);
        }
}

void unpack_k_scales(Bytes p, Unpacked& out) {
    for (int g = 0; g < 8; ++g)
        for (int r = 0; r < kPanel; ++r) {
            out.scale[g][r] = half_at(p, r) * six_bits(p + 64, p + 192, g, r);
            out.offset[g][r] = half_at(p + 32, r) * six_bits(p + 128, p + 224, g, r);
        }
}

void unpack_q4_k(Bytes p, Unpacked& out) {
    unpack_k_scales(p, out);
    for (int g = 0; g < 8; ++g)
        for (int i = 0; i < 512; ++i) out.u[512 * g + i] = nibble(p + 256 + g / 2 * 512 + i, g & 1);
}

void unpack_q5_k(Bytes p, Unpacked& out) {
    unpack_k_scales(p, out);
    for (int g = 0; g < 8; ++g)
        for (int i = 0; i < 512; ++i)
            out.u[512 * g + i] =
                nibble(p + 384 + g / 2 * 640 + i, g & 1) | bit_at(p + 256 + g / 2 * 640 + 64 * (g & 1), i) << 4;
}

void unpack_q6_k(Bytes p, Unpacked& out) {
    for (int g = 0; g < 8; ++g) {
        const int j = g % 4;
        const Bytes half = p + 288 + g / 4 * 1536;
        for (int i = 0; i < 512; ++i) {
            const Bytes both = half + i / 64 * 128 + i % 64;  // low bits of the first 8 slots, then high ones
            out.u[512 * g + i] = nibble(j & 1 ? half + 1024 + i : both, j >> 1) | two_bits(both + 64, j) << 4;
        }
    }
    for (int s = 0; s < 16; ++s)
        for (int r = 0; r < kPanel; ++r) {
            out.scale[s][r] = half_at(p, r) * static_cast<int8_t>(p[32 + s * kPanel + r]);
        }
}

void unpack_iq4_xs(Bytes p, Unpacked& out) {
    for (int g = 0; g < 8; ++g) {
        for (int i = 0; i < 512; ++i)
            out.u[512 * g + i] = kIQ4Levels[nibble(p + 128 + 256 * g + i % 256, i / 256)] + 128;
        for (int r = 0; r < kPanel; ++r) {
            out.scale[g][r] = half_at(p, r) * (six_bits(p + 32, p + 96, g, r) - 32);
        }
    }
}

void unpack_tq2_0(Bytes p, Unpacked& out) {
    for (int g = 0; g < 8; ++g) {
        for (int i = 0; i < 512; ++i) out.u[512 * g + i] = two_bits(p + 32 + g / 4 * 512 + i, g % 4);
        for (int r = 0; r < kPanel; ++r) out.scale[g][r] = half_at(p, r);
    }
}

void unpack_tq1_0(Bytes p, Unpacked& out) {
    // slots `first`, first + step … are the digits of one word
    auto digits = [&](Bytes word, int first, int step, int n_digits) {
        for (int i = 0; i < 64; ++i) {
            unsigned fraction = word[i];
            for (int n = 0; n < n_digits; ++n, fraction = fraction * 3 & 255)
                out.u[64 * (first + n * step) + i] = fraction * 3 >> 8;
        }
    };
    for (int i = 0; i < 8; ++i) digits(p + 32 + 64 * i, i, 8, 5);
    for (int i = 0; i < 4; ++i) digits(p + 544 + 64 * i, 40 + i, 4, 5);
    digits(p + 800, 60, 1, 4);
    for (int g = 0; g < 8; ++g)
        for (int r = 0; r < kPanel; ++r) out.scale[g][r] = half_at(p, r);
}

void unpack_mxfp4(Bytes p, Unpacked& out) {
    for (int i = 0; i < 512; ++i) out.u[i] = kMXFP4Levels[nibble(p + 16 + i % 256, i / 256)] + 16;
    for (int r = 0; r < kPanel; ++r) out.scale[0][r] = mxfp4_scale(p[r]);
}

// Weights of row r from column `column` on, n of them, from a codebook's entry: n_bits for the number of each level.
// Bit j of signs: weight j is negative.
void put_entry(Unpacked& out, int r, int column, int n, const int8_t* levels, int entry, int n_bits, uint32_t signs,
               int bias) {
    for (int j = 0; j < n; ++j) {
        const int level = levels[entry >> n_bits * j & ((1 << n_bits) - 1)], at = column + j;
        out.u[at / 4 * 64 + 4 * r + at % 4] = bias + (signs >> j & 1 ? -level : level);
    }
}

uint16_t word_at(Bytes p, int i) { return p[2 * i] | p[2 * i + 1] << 8; }

// The byte of signs of row r, columns 8 i … 8 i + 7
int sign_byte(Bytes signs, int i, int r) {
    const Bytes low = signs + i / 4 * 64 + i % 4 * 8 + r / 2;
    return nibble(low, r % 2) | nibble(low + 32, r % 2) << 4;
}

// The scale of group g, whose bits stand where eighth signs would
int scale_among_signs(Bytes signs, int g, int r) {
    int scale = 0;
    for (int j = 0; j < 4; ++j) scale |= (sign_byte(signs, 4 * g + j, r) >> 7) << j;
    return scale;
}

// 8 · (level ± 1/8) around 16
void put_iq1(Unpacked& out, int r, int i, int entry, bool minus) {
    for (int j = 0; j < 8; ++j)
        out.u[(2 * i + j / 4) * 64 + 4 * r + j % 4] =
            16 + 8 * kIQ1Levels[kIQ1Grid[entry] >> 2 * j & 3] + (minus ? -1 : 1);
}

void unpack_iq1_s(Bytes p, Unpacked& out) {
    for (int r = 0; r < kPanel; ++r)
        for (int g = 0; g < 8; ++g) {
            const int high = word_at(p + 544 + 32 * g, r);
            for (int j = 0; j < 4; ++j)
                put_iq1(out, r, 4 * g + j, p[32 + 64 * g + 4 * r + j] | (high >> 3 * j & 7) << 8, high >> 15);
            out.scale[g][r] = half_at(p, r) * (2 * (high >> 12 & 7) + 1) * 0.125f;
        }
}

void unpack_iq1_m(Bytes p, Unpacked& out) {
    for (int r = 0; r < kPanel; ++r) {
        uint16_t d = 0;
        for (int k = 0; k < 4; ++k) d |= word_at(p + 32 * k, r) >> 12 << 4 * k;
        for (int g = 0; g < 8; ++g) {
            const int high = word_at(p + 128 + 32 * g, r);
            for (int j = 0; j < 4; ++j)
                put_iq1(out, r, 4 * g + j, p[384 + 64 * g + 4 * r + j] | (high >> 4 * j & 7) << 8,
                        high >> (4 * j + 3) & 1);
            for (int part = 0; part < 2; ++part) {
                const int scale = word_at(p + g / 2 * 32, r) >> (6 * (g % 2) + 3 * part) & 7;
                out.scale[2 * g + part][r] = half_to_float(d) * (2 * scale + 1) * 0.125f;
            }
        }
    }
}

void unpack_iq2_xxs(Bytes p, Unpacked& out) {
    const Bytes signs = p + 544;
    for (int r = 0; r < kPanel; ++r) {
        for (int i = 0; i < 32; ++i)
            put_entry(out, r, 8 * i, 8, kIQ2Levels, kIQ2XXSGrid[p[32 + i / 4 * 64 + 4 * r + i % 4]], 2,
                      even_signs(sign_byte(signs, i, r) & 127), 64);
        for (int g = 0; g < 8; ++g) out.scale[g][r] = half_at(p, r) * (0.5f + scale_among_signs(signs, g, r)) * 0.25f;
    }
}

void unpack_iq2_xs(Bytes p, Unpacked& out) {
    for (int r = 0; r < kPanel; ++r) {
        for (int i = 0; i < 32; ++i) {
            const int signs = sign_byte(p + 672, i, r);
            const int entry = p[160 + i / 4 * 64 + 4 * r + i % 4] | signs >> 7 << 8;
            put_entry(out, r, 8 * i, 8, kIQ2Levels, kIQ2XSGrid[entry], 2, even_signs(signs & 127), 64);
        }
        for (int s = 0; s < 16; ++s)
            out.scale[s][r] = half_at(p, r) * (0.5f + nibble(p + 32 + s / 2 * kPanel + r, s % 2)) * 0.25f;
    }
}

void unpack_iq2_s(Bytes p, Unpacked& out) {
    for (int r = 0; r < kPanel; ++r) {
        for (int i = 0; i < 32; ++i) {
            const int entry = p[288 + i / 4 * 64 + 4 * r + i % 4] | two_bits(p + 160 + i / 4 * kPanel + r, i % 4) << 8;
            put_entry(out, r, 8 * i, 8, kIQ2Levels, kIQ2SGrid[entry], 2, sign_byte(p + 800, i, r), 64);
        }
        for (int s = 0; s < 16; ++s)
            out.scale[s][r] = half_at(p, r) * (0.5f + nibble(p + 32 + s / 2 * kPanel + r, s % 2)) * 0.25f;
    }
}

void unpack_iq3_xxs(Bytes p, Unpacked& out) {
    const Bytes signs = p + 1056;
    for (int r = 0; r < kPanel; ++r) {
        for (int i = 0; i < 64; ++i)
            put_entry(out, r, 4 * i, 4, kIQ3XXSLevels, kIQ3XXSGrid[p[32 + i / 4 * 64 + 4 * r + i % 4]], 4,
                      even_signs(sign_byte(signs, i / 2, r) & 127) >> 4 * (i % 2), 64);
        for (int g = 0; g < 8; ++g) out.scale[g][r] = half_at(p, r) * (0.5f + scale_among_signs(signs, g, r)) * 0.5f;
    }
}

void unpack_iq3_s(Bytes p, Unpacked& out) {
    for (int r = 0; r < kPanel; ++r) {
        for (int i = 0; i < 64; ++i) {
            const int high = p[96 + i / 8 * kPanel + r] >> i % 8 & 1;
            put_entry(out, r, 4 * i, 4, kIQ3SLevels, kIQ3SGrid[p[224 + i / 4 * 64 + 4 * r + i % 4] | high << 8], 4,
                      sign_byte(p + 1248, i / 2, r) >> 4 * (i % 2), 16);
        }
        for (int g = 0; g < 8; ++g)
            out.scale[g][r] = half_at(p, r) * (1 + 2 * nibble(p + 32 + g / 2 * kPanel + r, g % 2));
    }
}

// One column group of x, seen from column c of width w.
struct Column {
    const int8_t *q, *q_low;
    const float *d, *ds32, *ds16, *x;
    int w;
};

Column column_of(const Activations& x, int group_begin, int w, int c) {
    const ActivationArrays at = arrays_at(x.data, static_cast<size_t>(group_begin) * x.n_cols);
    const ActivationArrays from = arrays_from(at, c);
    return {from.q, from.q_low, from.d, from.ds32, from.ds16, from.x, w};
}

// How the numbers of a format's blocks are to be read.
struct Format {
    int columns;  // a block
    bool halves;  // a scale for 16 columns, otherwise for 32
    int bias;
    bool offset;
};

template <Format kFormat, void (*unpack)(Bytes, Unpacked&)>
void accumulate_integer(Bytes block, int first_group, const Column& x, float* sum, Unpacked& scratch, bool fresh) {
    if (fresh) unpack(block, scratch);
    for (int i = 0; i < kFormat.columns / kGroup; ++i) {
        const int g = first_group + i;
        const float d = x.d[g * x.w];
        for (int r = 0; r < kPanel; ++r) {
            int dot[2] = {0, 0};
            for (int k = 0; k < kGroup; ++k) {
                const int at = g * kGroup * x.w + k;
                const int v = x.q_low ? 256 * x.q[at] + x.q_low[at] : x.q[at];
                dot[k / 16] += (scratch.u[(8 * i + k / 4) * 64 + 4 * r + k % 4] - kFormat.bias) * v;
            }
            if constexpr (kFormat.halves) {
                const float t = scratch.scale[2 * i][r] * dot[0] + scratch.scale[2 * i + 1][r] * dot[1];
                sum[r] += t * d;
                if constexpr (kFormat.offset) {
                    sum[r] -= scratch.offset[2 * i][r] * x.ds16[2 * g * x.w];
                    sum[r] -= scratch.offset[2 * i + 1][r] * x.ds16[(2 * g + 1) * x.w];
                }
            } else {
                sum[r] += scratch.scale[i][r] * (dot[0] + dot[1]) * d;
                if constexpr (kFormat.offset) sum[r] -= scratch.offset[i][r] * x.ds32[g * x.w];
            }
        }
    }
}

void store(const float* sum, int row, int n_rows, float* out) {
    for (int r = 0; r < kPanel && row + r < n_rows; ++r) out[row + r] = sum[r];
}

template <Format kFormat, void (*unpack)(Bytes, Unpacked&)>
void matmul_integer(const Matrix& w, const Activations& x, int panel_begin, int panel_end, float* out, size_t ld_out,
                    std::byte* scratch) {
    auto& unpacked = *reinterpret_cast<Unpacked*>(scratch);
    const int n_blocks = w.n_cols / kFormat.columns;
    const size_t block_bytes = w.stride / n_blocks;
    auto* sums = reinterpret_cast<float (*)[kPanel]>(scratch + sizeof(Unpacked));
    constexpr int kSums = (kScratchBytes - sizeof(Unpacked)) / sizeof(*sums) / kMaxWidth * kMaxWidth;
    for (int c0 = 0; c0 < x.n_tokens; c0 += kSums) {  // as many columns as there are sums
        const int c1 = x.n_tokens - c0 < kSums ? x.n_tokens : c0 + kSums;
        for (int panel = panel_begin; panel < panel_end; ++panel) {
            for (int c = c0; c < c1; ++c)
                for (int r = 0; r < kPanel; ++r) sums[c - c0][r] = 0;
            for (int block = 0; block < n_blocks; ++block) {
                const auto* p = reinterpret_cast<Bytes>(w.data + panel * w.stride + block * block_bytes);
                bool fresh = true;
                for (int begin = c0, width; begin < c1; begin += width) {
                    width = column_group_width(x.n_tokens - begin);
                    for (int c = 0; c < width; ++c, fresh = false)
                        accumulate_integer<kFormat, unpack>(p, block * kFormat.columns / kGroup,
                                                            column_of(x, begin, width, c), sums[begin + c - c0],
                                                            unpacked, fresh);
                }
            }
            for (int c = c0; c < c1; ++c) store(sums[c - c0], panel * kPanel, w.n_rows, out + c * ld_out);
        }
    }
}

// A panel of a float format as F32 [n_cols][16], kGroup columns from `k`.
void read_float_panel(const Matrix& w, int panel, int k, float (*out)[kPanel]) {
    const std::byte* p = w.data + panel * w.stride;
    for (int i = 0; i < kGroup; ++i)
        for (int r = 0; r < kPanel; ++r) {
            uint16_t bits;
            if (w.dtype == DType::F32) {
                std::memcpy(&out[i][r], p + ((k + i) * kPanel + r) * 4, 4);
            } else if (w.dtype == DType::F16) {
                std::memcpy(&bits, p + ((k + i) * kPanel + r) * 2, 2);
                out[i][r] = half_to_float(bits);
            } else {
                std::memcpy(&bits, p + ((k + i) / 2 * kPanel * 2 + r * 2 + i % 2) * 2, 2);
                out[i][r] = bfloat16_to_float(bits);
            }
        }
}

template <typename ReadGroup>
void multiply_float(int n_groups, const Activations& x, int row, int n_rows, float* out, size_t ld_out,
                    ReadGroup read_group) {
    float w[kGroup][kPanel];
    for (int g = 0; g < n_groups; ++g) {
        read_group(g, w);
        for (int begin = 0, width; begin < x.n_tokens; begin += width) {
            width = column_group_width(x.n_tokens - begin);
            for (int c = 0; c < width; ++c) {
                const Column column = column_of(x, begin, width, c);
                float* sum = out + (begin + c) * ld_out + row;
                for (int r = 0; r < kPanel && row + r < n_rows; ++r) {
                    float part = 0;
                    for (int i = 0; i < kGroup; ++i) part += w[i][r] * column.x[(g * kGroup + i) * width];
                    sum[r] = g ? sum[r] + part : part;
                }
            }
        }
    }
}

void matmul_float(const Matrix& w, const Activations& x, int panel_begin, int panel_end, float* out, size_t ld_out,
                  std::byte*) {
    for (int panel = panel_begin; panel < panel_end; ++panel)
        multiply_float(w.n_cols / kGroup, x, panel * kPanel, w.n_rows, out, ld_out,
                       [&](int g, float (*to)[kPanel]) { read_float_panel(w, panel, g * kGroup, to); });
}

// Formats without a packed layout: 256 columns of 16 rows are decoded at a time.
void matmul_rows(const Matrix& w, const Activations& x, int panel_begin, int panel_end, float* out, size_t ld_out,
                 std::byte* scratch) {
    const FormatInfo& format = format_of(w.dtype);
    auto* decoded = reinterpret_cast<float (*)[kBlock]>(scratch);
    for (int panel = panel_begin; panel < panel_end; ++panel)
        multiply_float(w.n_cols / kGroup, x, panel * kPanel, w.n_rows, out, ld_out, [&](int g, float (*to)[kPanel]) {
            const int k = g * kGroup, begin = k / kBlock * kBlock;
            const int n = w.n_cols - begin < kBlock ? w.n_cols - begin : kBlock;
            for (int r = 0; r < kPanel; ++r) {
                const int row = panel * kPanel + r;
                if (k == begin && row < w.n_rows)
                    format.decode(w.data + row * w.stride + row_bytes(format, begin), decoded[r], n);
                for (int i = 0; i < kGroup; ++i) to[i][r] = row < w.n_rows ? decoded[r][k - begin + i] : 0;
            }
        });
}

void matmul_scalar(const Matrix& w, const Activations& x, int panel_begin, int panel_end, float* out, size_t ld_out,
                   std::byte* scratch) {
    auto* multiply = !w.packed                   ? matmul_rows
                     : w.dtype == DType::Q4_0    ? matmul_integer<Format{32, false, 8, false}, unpack_q4_0>
                     : w.dtype == DType::Q4_1    ? matmul_integer<Format{32, false, 0, true}, unpack_q4_1>
                     : w.dtype == DType::Q5_0    ? matmul_integer<Format{32, false, 16, false}, unpack_q5_0>
                     : w.dtype == DType::Q5_1    ? matmul_integer<Format{32, false, 0, true}, unpack_q5_1>
                     : w.dtype == DType::Q2_K    ? matmul_integer<Format{256, true, 0, true}, unpack_q2_k>
                     : w.dtype == DType::Q3_K    ? matmul_integer<Format{256, true, 4, false}, unpack_q3_k>
                     : w.dtype == DType::Q8_0    ? matmul_integer<Format{32, false, 128, false}, unpack_q8_0>
                     : w.dtype == DType::IQ4_NL  ? matmul_integer<Format{32, false, 128, false}, unpack_iq4_nl>
                     : w.dtype == DType::IQ4_XS  ? matmul_integer<Format{256, false, 128, false}, unpack_iq4_xs>
                     : w.dtype == DType::Q4_K    ? matmul_integer<Format{256, false, 0, true}, unpack_q4_k>
                     : w.dtype == DType::Q5_K    ? matmul_integer<Format{256, false, 0, true}, unpack_q5_k>
                     : w.dtype == DType::Q6_K    ? matmul_integer<Format{256, true, 32, false}, unpack_q6_k>
                     : w.dtype == DType::IQ1_S   ? matmul_integer<Format{256, false, 16, false}, unpack_iq1_s>
                     : w.dtype == DType::IQ1_M   ? matmul_integer<Format{256, true, 16, false}, unpack_iq1_m>
                     : w.dtype == DType::IQ2_XXS ? matmul_integer<Format{256, false, 64, false}, unpack_iq2_xxs>
                     : w.dtype == DType::IQ2_XS  ? matmul_integer<Format{256, true, 64, false}, unpack_iq2_xs>
                     : w.dtype == DType::IQ2_S   ? matmul_integer<Format{256, true, 64, false}, unpack_iq2_s>
                     : w.dtype == DType::IQ3_XXS ? matmul_integer<Format{256, false, 64, false}, unpack_iq3_xxs>
                     : w.dtype == DType::IQ3_S   ? matmul_integer<Format{256, false, 16, false}, unpack_iq3_s>
                     : w.dtype == DType::TQ1_0   ? matmul_integer<Format{256, false, 1, false}, unpack_tq1_0>
                     : w.dtype == DType::TQ2_0   ? matmul_integer<Format{256, false, 1, false}, unpack_tq2_0>
                     : w.dtype == DType::MXFP4   ? matmul_integer<Format{32, false, 16, false}, unpack_mxfp4>
                                                 : matmul_float;
    multiply(w, x, panel_begin, panel_end, out, ld_out, scratch);
}

}  // namespace

void fill_matmul_scalar(Kernels& k) { k.matmul = matmul_scalar; }

}  // namespace gemmart::cpu
