// A pass: a batch of rows through the layers of a range.
#include <algorithm>
#include <bit>
#include <cstring>

#include "cuda/executor.cuh"
#include "error.h"

namespace gemmart::gpu {
namespace {

constexpr size_t kRecorded = 64;  // passes that a context keeps

}  // namespace

// A batch, with its rows in the device's order: those of segments of few tokens first.
struct Context::Pass {
    int n = 0, n_few = 0;
    std::vector<const GemmartSegment*> segments;  // in this order
    int n_few_segments = 0;
    std::vector<int> row_of;  // [n] the batch's row of each of the device's
    // The device's rows that want logits, and those that want states, in the order in which the batch asks; all of
    // these, ascending, go on behind the last layer's attention.
    std::vector<int> outputs, hidden, last;
    int n_few_last = 0;
    int n_seen = 0;  // positions that a row may see, in whole ranges; of few rows alone a power of 2 of them
    Places places{};
    const int32_t *last_rows = nullptr, *output_rows = nullptr, *hidden_rows = nullptr;  // on the device

    explicit Pass(const GemmartBatch& batch);
    std::vector<int> key() const {
        return {n, places.n_segments, n_seen, static_cast<int>(outputs.size()), static_cast<int>(hidden.size())};
    }
};

Context::Pass::Pass(const GemmartBatch& batch) {
    std::vector<int> first_row(batch.n_segments);
    for (int i = 0; i < batch.n_segments; ++i) {
        first_row[i] = n;
        n += batch.segments[i].n_tokens;
    }
    std::vector<int> device_row(n);
    for (const bool few : {true, false}) {
        for (int i = 0; i < batch.n_segments; ++i) {
            const GemmartSegment& s = batch.segments[i];
            if ((s.n_tokens <= kFewTokens) != few) continue;
            segments.push_back(&s);
            for (int t = 0; t < s.n_tokens; ++t) {
                device_row[first_row[i] + t] = static_cast<int>(row_of.size());
                row_of.push_back(first_row[i] + t);
            }
            places.last_position = std::max(places.last_position, s.start + s.n_tokens - 1);
        }
        if (few) n_few = static_cast<int>(row_of.size()), n_few_segments = static_cast<int>(segments.size());
    }
    for (int i = 0; i < batch.n_outputs; ++i) outputs.push_back(device_row[batch.outputs[i]]);
    for (int i = 0; i < batch.n_hidden; ++i) hidden.push_back(device_row[batch.hidden[i]]);
    last = outputs;
    last.insert(last.end(), hidden.begin(), hidden.end());
    std::sort(last.begin(), last.end());
    n_few_last = static_cast<int>(std::lower_bound(last.begin(), last.end(), n_few) - last.begin());
    const unsigned n_ranges = places.last_position / kRange + 1;
    n_seen = kRange * static_cast<int>(n == n_few ? std::bit_ceil(n_ranges) : n_ranges);
    places.n = n, places.n_few = n_few;
    places.n_segments = batch.n_segments, places.n_few_segments = n_few_segments;
    places.max_pages = n_seen / kPageTokens;
    places.last_position = n_seen - 1;
}

void Context::upload_tables(Pass& pass) {
    Places& p = pass.places;
    std::vector<int32_t> table;
    const auto begin = [&] { return table.size(); };
    const size_t positions = begin();
    for (const GemmartSegment* s : pass.segments)
        for (int t = 0; t < s->n_tokens; ++t) table.push_back(s->start + t);
    const size_t segment_of = begin();
    for (size_t i = 0; i < pass.segments.size(); ++i)
        table.insert(table.end(), pass.segments[i]->n_tokens, static_cast<int32_t>(i));
    const size_t first_row = begin();
    table.push_back(0);
    for (const GemmartSegment* s : pass.segments) table.push_back(table.back() + s->n_tokens);
    size_t pages[2];
    for (int group : {Global, Windowed}) {
        pages[group] = begin();
        for (const GemmartSegment* s : pass.segments) {
            const int n = std::min(s->n_pages[group], p.max_pages);
            table.insert(table.end(), s->pages[group], s->pages[group] + n);
            table.insert(table.end(), p.max_pages - n, -1);
        }
    }
    const size_t last = begin();
    table.insert(table.end(), pass.last.begin(), pass.last.end());
    const size_t outputs = begin();
    table.insert(table.end(), pass.outputs.begin(), pass.outputs.end());
    const size_t hidden = begin();
    table.insert(table.end(), pass.hidden.begin(), pass.hidden.end());

    Executor& e = executor_;
    const size_t n_bytes = table.size() * sizeof(int32_t);
    e.tables.grow(n_bytes, "tables");
    e.n_moves += e.table_memory.grow(n_bytes, "tables");
    std::memcpy(e.tables.data(), table.data(), n_bytes);
    check_device(cudaMemcpyAsync(e.table_memory.data(), e.tables.data(), n_bytes, cudaMemcpyHostToDevice, e.stream),
                 "tables");
    const auto at = [&](size_t i) { return e.table_memory.as<int32_t>() + i; };
    p.positions = at(positions), p.segment_of = at(segment_of), p.first_row = at(first_row);
    p.pages[Global] = at(pages[Global]), p.pages[Windowed] = at(pages[Windowed]);
    pass.last_rows = at(last), pass.output_rows = at(outputs), pass.hidden_rows = at(hidden);
}

// The rows of the host in the device's order, or back.
void Context::copy_rows(const Pass& pass, float* x, bool to_device) {
    Executor& e = executor_;
    const size_t dim = e.facts.dim, n_bytes = pass.n * dim * sizeof(float);
    e.staging.grow(n_bytes + pass.n, "rows");  // room for all that comes back, too
    const auto rows = e.staging.as<float>();
    if (to_device) {
        for (int i = 0; i < pass.n; ++i) std::memcpy(rows + i * dim, x + pass.row_of[i] * dim, dim * sizeof(float));
        check_device(cudaMemcpyAsync(e.buffers.x, rows, n_bytes, cudaMemcpyHostToDevice, e.stream), "rows");
    } else {
        check_device(cudaMemcpyAsync(rows, e.buffers.x, n_bytes, cudaMemcpyDeviceToHost, e.stream), "rows");
        check_device(cudaStreamSynchronize(e.stream), "computing");
        for (int i = 0; i < pass.n; ++i) std::memcpy(x + pass.row_of[i] * dim, rows + i * dim, dim * sizeof(float));
    }
}

void Context::forward(const GemmartBatch& batch, float* x, float* hidden, uint8_t* finite) {
    Executor& e = executor_;
    const bool head = e.weights.output.n_rows > 0;
    Pass pass(batch);
    check<std::invalid_argument>(pass.n >= 1 && pass.n <= e.facts.n_batch, "a batch has ", pass.n,
                                 " tokens, expected 1 to ", e.facts.n_batch);
    if (!head) pass.outputs.clear(), pass.hidden.clear();
    n_outputs_ = 0;
    const size_t n_judged = pass.outputs.size() + pass.hidden.size();
    upload_tables(pass);
    copy_rows(pass, x, true);
    int n_heads = 0, head_dim = 0;
    for (const Layer& l : e.weights.layers)
        n_heads = std::max(n_heads, l.n_heads), head_dim = std::max(head_dim, l.head_dim);
    e.n_moves +=
        e.attention_scratch.grow(attention_scratch_bytes(pass.n_few, n_heads, head_dim, pass.n_seen), "attention");
    e.n_moves += logits_.grow(pass.outputs.size() * e.facts.n_vocab * sizeof(float), "logits");
    e.n_moves += finite_.grow(n_judged, "logits");
    if (n_moves_ != e.n_moves) forget_recorded();
    n_moves_ = e.n_moves;
    if (pass.n == pass.n_few)
        run_recorded(pass);
    else
        run(pass);
    if (!head) return copy_rows(pass, x, false);

    const size_t state_bytes = pass.hidden.size() * e.facts.dim * sizeof(float);
    if (state_bytes)
        check_device(cudaMemcpyAsync(e.staging.data(), e.buffers.proj, state_bytes, cudaMemcpyDeviceToHost, e.stream),
                     "states");
    if (n_judged)
        check_device(
            cudaMemcpyAsync(e.staging.data() + state_bytes, finite_.data(), n_judged, cudaMemcpyDeviceToHost, e.stream),
            "logits");
    check_device(cudaStreamSynchronize(e.stream), "computing");
    if (state_bytes) std::memcpy(hidden, e.staging.data(), state_bytes);
    if (n_judged) std::memcpy(finite, e.staging.data() + state_bytes, n_judged);
    n_outputs_ = static_cast<int>(pass.outputs.size());
}

// Starting some hundred kernels one by one takes longer than a small model's weights take to be read: a pass of few
// rows is recorded when its like comes again, and then started at once.
void Context::run_recorded(const Pass& pass) {
    if (recorded_.size() > kRecorded) forget_recorded();
    Recorded& recorded = recorded_[pass.key()];
    if (++recorded.n_seen == 1 || !records_) return run(pass);
    if (!recorded.graph) recorded.graph = record(pass);
    if (!recorded.graph) {
        records_ = false;
        return run(pass);
    }
    check_device(cudaGraphLaunch(recorded.graph, executor_.stream), "computing");
}

// Null where the driver does not record such a pass; what else is wrong with it shows when it runs.
cudaGraphExec_t Context::record(const Pass& pass) {
    const cudaStream_t stream = executor_.stream;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t made = nullptr;
    bool whole = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess;
    if (whole) {
        try {
            run(pass);
        } catch (const Error&) {
            whole = false;
        }
        whole = cudaStreamEndCapture(stream, &graph) == cudaSuccess && whole;
    }
    if (whole && cudaGraphInstantiate(&made, graph, 0) != cudaSuccess) made = nullptr;
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();  // it is nobody else's
    return made;
}

void Context::run(const Pass& pass) {
    const Executor& e = executor_;
    const Buffers& b = e.buffers;
    for (size_t r = 0; r < e.rope_halves.size(); ++r) {
        const size_t at = r * e.facts.n_batch * e.widest_half();
        rope_angles(pass.places, e.weights.inv_freq[r], e.rope_halves[r], b.cosines + at, b.sines + at, e.stream);
    }
    // Queries and keys weigh most in the error: what they are made of always has two terms.
    norm_rows({e.facts.dim, e.facts.norm_eps, b.x, nullptr, nullptr, nullptr, e.weights.layers[0].attn_norm, nullptr},
              rows(pass.n, pass.n_few, e.facts.dim, true), e.stream);
    for (size_t i = 0; i < e.weights.layers.size(); ++i) run_layer(pass, static_cast<int>(i));
    if (e.weights.output.n_rows) run_head(pass);
}

// Rows of the next products, in the room that all products share.
Rows Context::rows(int n, int n_few, int n_cols, bool two_terms) const {
    Rows rows = rows_at(executor_.buffers.rows, n, n_few, n_cols);
    if (!two_terms) rows.q_low = nullptr, rows.lo = nullptr;
    return rows;
}

void Context::run_layer(const Pass& pass, int index) {
    const Executor& e = executor_;
    const Buffers& b = e.buffers;
    const Layer& l = e.weights.layers[index];
    const bool last = index + 1 == static_cast<int>(e.weights.layers.size()), precise = e.facts.precise;
    const bool some = last && e.weights.output.n_rows;  // behind the attention only rows that are asked for go on
    const int dim = e.facts.dim, q_dim = l.n_heads * l.head_dim, kv_dim = l.n_kv_heads * l.head_dim;
    const Product qkv[] = {{l.wq, b.q, q_dim}, {l.wk, b.k, kv_dim}, {l.wv, b.v, kv_dim}};
    multiply(qkv, 3, rows(pass.n, pass.n_few, dim, true), b.scratch, e.facts.own_gemm, e.stream);

    const size_t angles = static_cast<size_t>(l.rope) * e.facts.n_batch * e.widest_half();
    const int group = l.window ? Windowed : Global;
    const AttentionLayer layer{l.n_heads,
                               l.n_kv_heads,
                               l.head_dim,
                               l.window,
                               l.query_scale,
                               e.facts.attention_softcap,
                               e.rope_neox[l.rope],
                               l.q_norm,
                               l.k_norm,
                               b.cosines + angles,
                               b.sines + angles,
                               e.facts.norm_eps,
                               {type_, kv_head_layout(type_, l.head_dim), pages_[group].data() + layout_.offsets[index],
                                layout_.page_bytes[group], group}};
    place_heads(pass.places, layer, b.q, b.k, b.v, e.stream);
    const int n = some ? static_cast<int>(pass.last.size()) : pass.n, n_few = some ? pass.n_few_last : pass.n_few;
    if (n == 0) return;
    const int32_t* chosen = some ? pass.last_rows : nullptr;
    attention(pass.places, layer, b.q, b.attended, e.attention_scratch.data(), e.stream);

    const Rows attended = rows(n, n_few, q_dim, precise);
    convert_rows(b.attended, chosen, attended, e.stream);
    const Product wo{l.wo, b.proj, dim};
    multiply(&wo, 1, attended, b.scratch, e.facts.own_gemm, e.stream);
    const Rows normed = rows(n, n_few, dim, precise);
    norm_rows({dim, e.facts.norm_eps, b.x, chosen, b.proj, l.post_attn_norm, l.ffn_norm, nullptr}, normed, e.stream);
    const Product gate_up[] = {{l.gate, b.gate, l.ffn_dim}, {l.up, b.up, l.ffn_dim}};
    multiply(gate_up, 2, normed, b.scratch, e.facts.own_gemm, e.stream);
    const Rows act = rows(n, n_few, l.ffn_dim, precise);
    gate_rows(e.activation, b.gate, b.up, act, e.stream);
    const Product down{l.down, b.proj, dim};
    multiply(&down, 1, act, b.scratch, e.facts.own_gemm, e.stream);
    const float* next_norm = last ? nullptr : e.weights.layers[index + 1].attn_norm;
    norm_rows({dim, e.facts.norm_eps, b.x, chosen, b.proj, l.post_ffn_norm, next_norm, nullptr},
              rows(n, n_few, dim, true), e.stream);
}

// The head's rows are FEW ones, whatever they came from: they are, but where whole prompts are judged.
void Context::run_head(const Pass& pass) {
    const Executor& e = executor_;
    const Buffers& b = e.buffers;
    const int dim = e.facts.dim, n_outputs = static_cast<int>(pass.outputs.size()),
              n_hidden = static_cast<int>(pass.hidden.size());
    NormJob norm{dim, e.facts.norm_eps, b.x, pass.output_rows, nullptr, nullptr, e.weights.output_norm, nullptr};
    if (n_outputs) {
        const Rows outputs = rows(n_outputs, n_outputs, dim, e.facts.precise);
        norm_rows(norm, outputs, e.stream);
        const Product head{e.weights.output, logits_.as<float>(), e.facts.n_vocab};
        multiply(&head, 1, outputs, b.scratch, e.facts.own_gemm, e.stream);
        cap_logits(logits_.as<float>(), n_outputs, e.facts.n_vocab, e.facts.final_softcap, finite_.as<uint8_t>(),
                   e.stream);
    }
    if (n_hidden) {
        norm.rows = pass.hidden_rows, norm.states = b.proj;
        norm_rows(norm, rows(n_hidden, n_hidden, dim, false), e.stream);
        cap_logits(b.proj, n_hidden, dim, 0, finite_.as<uint8_t>() + n_outputs, e.stream);
    }
}

}  // namespace gemmart::gpu
