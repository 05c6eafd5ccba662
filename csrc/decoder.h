// The dense decoder that all families share, described by plain data: a family fills in a Config, executors run it.
//
// Dimensions, here and everywhere: n_tokens rows of a batch; dim the width of the residual stream; n_heads query heads
// and n_kv_heads key/value heads of head_dim each; ffn_dim the width of the gated feed-forward; n_vocab; pos a position
// in a sequence.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace gemmart {

enum class Activation { Gelu, Silu };  // Gelu: the tanh form

struct RopeFacts {
    bool neox;                     // pairs (i, i + head_dim/2); otherwise neighbours (2i, 2i + 1)
    std::vector<double> inv_freq;  // [head_dim / 2] radians a position, scaling included
};

struct LayerFacts {
    int n_heads;
    int n_kv_heads;
    int head_dim;
    int ffn_dim;
    int window;         // tokens; position p sees p - window + 1 … p; 0: everything
    int rope;           // index into Config::ropes
    float query_scale;  // multiplies queries after rope
};

struct Config {
    std::string family;
    int dim = 0;
    int n_vocab = 0;
    int n_ctx_train = 0;
    float norm_eps = 0;
    float embedding_scale = 1;    // Gemma: sqrt(dim), in float32
    float attention_softcap = 0;  // 0: none
    float final_softcap = 0;
    Activation activation = Activation::Gelu;
    bool post_norms = false;   // a norm after attention and after the feed-forward, before the residual sum
    bool qk_norm = false;      // RMSNorm of each head's query and key before rope
    bool tied_output = false;  // the output matrix is the token embedding
    std::vector<std::string> fact_tensors;  // tensors that the family's page has read itself
    std::vector<RopeFacts> ropes;
    std::vector<LayerFacts> layers;
};

// Tokens of several sequences to compute at once. Each segment is a run of consecutive positions of one sequence; its
// rows stand together.
struct Batch {
    struct Segment {
        int seq;
        int start;  // position of the first token
        int n_tokens;
    };
    std::vector<int32_t> tokens;  // [n_tokens], segment by segment
    std::vector<Segment> segments;
    std::vector<int> outputs;  // rows that want logits, ascending
    std::vector<int> hidden;   // rows that want their state behind the last norm instead, ascending
};

}  // namespace gemmart
