#include "select.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>

#include "error.h"

namespace gemmart {
namespace {

struct Candidate {
    float logit;
    int32_t id;
};

bool better(const Candidate& a, const Candidate& b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

// Numbers of a row that are changed; they are put back when it goes.
class Changes {
  public:
    explicit Changes(std::span<float> row) : row_(row) {}
    ~Changes() {
        for (auto old = before_.rbegin(); old != before_.rend(); ++old) row_[old->id] = old->logit;
    }
    float& at(int32_t id) {
        check<std::invalid_argument>(id >= 0 && id < static_cast<int64_t>(row_.size()), "token id ", id,
                                     " is outside [0, ", row_.size(), ")");
        before_.push_back({row_[id], id});
        return row_[id];
    }

  private:
    std::span<float> row_;
    std::vector<Candidate> before_;
};

void apply(const Adjustments& adjust, Changes& row) {
    for (size_t i = 0; i < adjust.bias_ids.size(); ++i) row.at(adjust.bias_ids[i]) += adjust.bias[i];
    if (adjust.repeat_penalty == 1 && adjust.presence_penalty == 0 && adjust.frequency_penalty == 0) return;
    std::map<int32_t, int> counts;
    for (int32_t id : adjust.recent) ++counts[id];
    for (const auto& [id, count] : counts) {
        float& logit = row.at(id);
        logit = logit > 0 ? logit / adjust.repeat_penalty : logit * adjust.repeat_penalty;
        logit -= adjust.presence_penalty + adjust.frequency_penalty * static_cast<float>(count);
    }
}

// What a mask allows of a row, close together.
struct Allowed {
    std::vector<float> logits;
    std::vector<int32_t> ids;
};

Allowed allowed(std::span<const float> row, std::span<const int32_t> mask) {
    check<std::invalid_argument>(mask.size() == (row.size() + 31) / 32, "the mask has ", mask.size(),
                                 " words, expected ", (row.size() + 31) / 32, " for ", row.size(), " tokens");
    Allowed out;
    out.logits.reserve(row.size());
    out.ids.reserve(row.size());
    for (size_t word = 0; word < mask.size(); ++word) {
        const size_t begin = 32 * word;
        uint32_t bits = static_cast<uint32_t>(mask[word]);
        if (row.size() - begin < 32) bits &= (uint32_t{1} << (row.size() - begin)) - 1;
        for (; bits; bits &= bits - 1) {
            const size_t id = begin + std::countr_zero(bits);
            out.logits.push_back(row[id]);
            out.ids.push_back(static_cast<int32_t>(id));
        }
    }
    check<std::invalid_argument>(!out.ids.empty(), "the mask allows no token");
    return out;
}

// The k best of `row`; `ids` are those of its tokens, empty: their places.
Candidates best(std::span<const float> row, std::span<const int32_t> ids, int k, const cpu::Kernels& kernels) {
    const int n = static_cast<int>(row.size());
    k = std::min(k, n);

    // A heap of the k best so far, the worst on top; most logits fall below it, and an equal one has a higher id.
    std::vector<Candidate> heap;
    for (int i = 0; i < k; ++i) heap.push_back({row[i], i});
    std::make_heap(heap.begin(), heap.end(), better);
    for (int i = k; (i = kernels.find_above(row.data(), i, n, heap.front().logit)) < n; ++i) {
        std::pop_heap(heap.begin(), heap.end(), better);
        heap.back() = {row[i], i};
        std::push_heap(heap.begin(), heap.end(), better);
    }
    std::sort_heap(heap.begin(), heap.end(), better);

    Candidates out;
    for (const Candidate& c : heap) {
        out.ids.push_back(ids.empty() ? c.id : ids[c.id]);
        out.logits.push_back(c.logit);
    }
    out.logsumexp = out.logits[0] + std::log(kernels.sum_exp(row.data(), n, out.logits[0]));
    return out;
}

}  // namespace

Candidates select(std::span<float> row, int k, const Adjustments& adjust, const cpu::Kernels& kernels) {
    check<std::invalid_argument>(k >= 1, "k is ", k, ", expected at least 1");
    Changes changes(row);
    apply(adjust, changes);
    if (adjust.mask.empty()) return best(row, {}, k, kernels);
    const Allowed some = allowed(row, adjust.mask);
    return best(some.logits, some.ids, k, kernels);
}

}  // namespace gemmart
