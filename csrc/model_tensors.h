// The tensors of a model by their role, checked for shape; nullptr where the family has none.
#pragma once

#include "decoder.h"
#include "gguf.h"

namespace gemmart {

struct LayerTensors {
    const Tensor *attn_norm, *wq, *wk, *wv, *wo, *q_norm, *k_norm, *post_attn_norm;
    const Tensor *ffn_norm, *gate, *up, *down, *post_ffn_norm;
};

struct ModelTensors {
    const Tensor *embedding, *output_norm, *output;  // output is the embedding where they are tied
    std::vector<LayerTensors> layers;
};

// Finds every tensor that `config` calls for and sets config.n_vocab and tied_output. Throws FormatError where one is
// missing or has another shape, UnsupportedError where the file has tensors that this decoder would not use.
ModelTensors find_tensors(const GgufFile& file, Config& config);

}  // namespace gemmart
