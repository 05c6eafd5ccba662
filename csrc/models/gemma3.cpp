// Gemma 3, text: Gemma 2 without caps, with norms of each head's query and key, and five windowed layers to a global
// one. The rope base and scaling in the file are those of the global layers; windowed ones keep base 10000.
#include <cmath>

#include "error.h"
#include "models/models.h"

namespace gemmart {

Config gemma3_facts(const GgufFile& file) {
    Config c = dense_facts(file, /*neox=*/true, 1000000);
    c.embedding_scale = std::sqrt(static_cast<float>(c.dim));
    c.activation = Activation::Gelu;
    c.post_norms = true;
    c.qk_norm = true;
    const uint64_t window = file.get_uint(family_key(file, "attention.sliding_window"));
    check<FormatError>(window >= 1 && window < 1 << 30, file.path(), ": ", family_key(file, "attention.sliding_window"),
                       " is ", window);
    c.ropes.push_back(rope_facts(c.layers[0].head_dim, 10000, 1, true));
    for (size_t i = 0; i < c.layers.size(); ++i) {
        LayerFacts& layer = c.layers[i];
        if ((i + 1) % 6 != 0) {
            layer.window = static_cast<int>(window);
            layer.rope = 1;
        }
        // As in Gemma 2: the 27B, which its 62 layers tell, divides queries by sqrt(dim / n_heads) = sqrt(168).
        if (c.layers.size() == 62) layer.query_scale = 1 / std::sqrt(static_cast<float>(c.dim) / layer.n_heads);
    }
    return c;
}

}  // namespace gemmart
