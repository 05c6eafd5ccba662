// Gemma 1: embedding × sqrt(dim), two norms a layer (converters fold the "+1" into the weights), GELU gate, tied
// output.
#include <cmath>

#include "models/models.h"

namespace gemmart {

Config gemma_facts(const GgufFile& file) {
    Config c = dense_facts(file, /*neox=*/true, 10000);
    c.embedding_scale = std::sqrt(static_cast<float>(c.dim));
    c.activation = Activation::Gelu;
    return c;
}

}  // namespace gemmart
