#include "model_tensors.h"

#include <set>

#include "error.h"

namespace gemmart {
namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text = "[";
    for (int64_t n : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(n);
    return text + "]";
}

class Finder {
  public:
    explicit Finder(const GgufFile& file) : file_(file) {}

    // `meaning` says in words what the expected sizes are.
    const Tensor* find(const std::string& name, std::vector<int64_t> shape, const char* meaning) {
        const Tensor* tensor = file_.find(name);
        check<FormatError>(tensor != nullptr, file_.path(), ": tensor ", name, " is missing");
        check<FormatError>(tensor->shape == shape, file_.path(), ": tensor ", name, " has shape ",
                           shape_text(tensor->shape), ", expected ", shape_text(shape), " (", meaning, ")");
        // Kernels work on groups of 32 columns.
        check<UnsupportedError>(shape.size() == 1 || shape[1] % 32 == 0, file_.path(), ": tensor ", name,
                                " has rows of ", shape.back(), " numbers; multiples of 32 are supported");
        used_.insert(name);
        return tensor;
    }

    void use(const std::string& name) { used_.insert(name); }

    void check_all_used() const {
        for (const Tensor& tensor : file_.tensors())
            check<UnsupportedError>(used_.count(tensor.name) != 0, file_.path(), ": tensor ", tensor.name,
                                    " is not part of the architecture ", file_.get_string("general.architecture"),
                                    " as supported here");
    }

  private:
    const GgufFile& file_;
    std::set<std::string> used_;
};

}  // namespace

ModelTensors find_tensors(const GgufFile& file, Config& config) {
    Finder finder(file);
    const Tensor* embedding = file.find("token_embd.weight");
    check<FormatError>(embedding != nullptr, file.path(), ": tensor token_embd.weight is missing");
    check<FormatError>(embedding->shape.size() == 2 && embedding->shape[0] >= 1 && embedding->shape[0] <= 1 << 21,
                       file.path(), ": tensor token_embd.weight has shape ", shape_text(embedding->shape),
                       ", expected [n_vocab <= 2097152, ", config.dim, "]");
    const int64_t dim = config.dim, n_rows = embedding->shape[0];
    // Some files pad the embedding: rows beyond the vocabulary stand for no token.
    const char* const tokens = "tokenizer.ggml.tokens";
    const int64_t n_tokens = file.has(tokens) ? static_cast<int64_t>(file.array_length(tokens)) : n_rows;
    check<FormatError>(n_tokens <= n_rows, file.path(), ": ", tokens, " has ", n_tokens,
                       " entries, but tensor token_embd.weight only ", n_rows, " rows");
    check<FormatError>(n_tokens >= 1, file.path(), ": ", tokens, " is empty");
    config.n_vocab = static_cast<int>(n_tokens);

    ModelTensors out;
    out.embedding = finder.find("token_embd.weight", {n_rows, dim}, "n_vocab, dim");
    out.output_norm = finder.find("output_norm.weight", {dim}, "dim");
    config.tied_output = file.find("output.weight") == nullptr;
    out.output = config.tied_output ? out.embedding : finder.find("output.weight", {n_rows, dim}, "n_vocab, dim");
    for (size_t i = 0; i < config.layers.size(); ++i) {
        const LayerFacts& layer = config.layers[i];
        const int64_t q = static_cast<int64_t>(layer.n_heads) * layer.head_dim,
                      kv = static_cast<int64_t>(layer.n_kv_heads) * layer.head_dim;
        const int64_t ffn = layer.ffn_dim;
        auto get = [&](const char* name, std::vector<int64_t> shape, const char* meaning) {
            return finder.find("blk." + std::to_string(i) + "." + name + ".weight", std::move(shape), meaning);
        };
        LayerTensors t{};
        t.attn_norm = get("attn_norm", {dim}, "dim");
        t.wq = get("attn_q", {q, dim}, "n_heads × head_dim, dim");
        t.wk = get("attn_k", {kv, dim}, "n_kv_heads × head_dim, dim");
        t.wv = get("attn_v", {kv, dim}, "n_kv_heads × head_dim, dim");
        t.wo = get("attn_output", {dim, q}, "dim, n_heads × head_dim");
        t.ffn_norm = get("ffn_norm", {dim}, "dim");
        t.gate = get("ffn_gate", {ffn, dim}, "ffn_dim, dim");
        t.up = get("ffn_up", {ffn, dim}, "ffn_dim, dim");
        t.down = get("ffn_down", {dim, ffn}, "dim, ffn_dim");
        if (config.qk_norm) {
            t.q_norm = get("attn_q_norm", {layer.head_dim}, "head_dim");
            t.k_norm = get("attn_k_norm", {layer.head_dim}, "head_dim");
        }
        if (config.post_norms) {
            t.post_attn_norm = get("post_attention_norm", {dim}, "dim");
            t.post_ffn_norm = get("post_ffw_norm", {dim}, "dim");
        }
        out.layers.push_back(t);
    }
    for (const std::string& name : config.fact_tensors) finder.use(name);
    finder.check_all_used();
    return out;
}

}  // namespace gemmart
