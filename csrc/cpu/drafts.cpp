#include "drafts.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace igpt::cpu {
namespace {

// Two contexts that fall together spoil a guess, and nothing else.
uint64_t mixed(uint64_t hash, int64_t value) {
    hash = (hash ^ uint64_t(value)) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 29;
}

}  // namespace

void Drafts::Hits::count(bool hit) {
    if (tries > kMemory) hits /= 2.0, tries /= 2.0;
    hits += hit ? 1.0 : 0.0, tries += 1.0;
}

Drafts::Drafts(std::vector<int64_t> pixels, std::vector<float> uniform, std::vector<int64_t> known, int64_t width,
               const SampleParams& settings)
    : pixels_(std::move(pixels)),
      known_(std::move(known)),
      uniform_(std::move(uniform)),
      given_(int64_t(pixels_.size())),
      width_(width),
      settings_(settings) {
    if (width < 1 || settings.k < 1 || (!known_.empty() && known_.size() != uniform_.size()))
        throw std::invalid_argument("drafts: want a width, tokens, and as many known ones as numbers");
    cumulative_.reserve(settings.temperature == 0.0f ? 0 : uniform_.size() * size_t(settings.k));
}

int64_t Drafts::learn(const float* logits, int64_t stride, int64_t rows, int64_t* tokens, float* logprobs) {
    const int64_t t = drawn(), drafted = int64_t(draft_.size()) - aside_, left = int64_t(uniform_.size()) - t;
    if (rows != drafted + 1 || rows > left) throw std::invalid_argument("drafts: want the logits of the last draft");
    std::array<int64_t, kMostRows> found;
    std::array<float, kMostRows> scores;
    const size_t before = cumulative_.size();
    const bool weighted = settings_.temperature != 0.0f;
    if (weighted) cumulative_.resize(before + size_t(rows * settings_.k));
    SampleParams p = settings_;
    p.logits = logits, p.stride = stride, p.rows = rows, p.threads = 1;
    p.uniform = uniform_.data() + t;
    p.known = known_.empty() ? nullptr : known_.data() + t;
    p.tokens = found.data(), p.logprobs = scores.data();
    p.cumulative = weighted ? cumulative_.data() + before : nullptr;
    sample(p);
    int64_t kept = 1;
    for (int64_t i = 0; i < int64_t(draft_.size()); ++i) {
        const bool hit = draft_[i].token == found[i];
        if (draft_[i].kind >= 0) hits_[draft_[i].kind].count(hit);
        if (!hit || i == drafted) break;
        ++kept;
    }
    last_.assign(found.begin() + kept, found.begin() + rows);
    last_from_ = t + kept;
    if (weighted) cumulative_.resize(before + size_t(kept * settings_.k));
    for (int64_t i = 0; i < kept; ++i) {
        for (const uint64_t key : neighbours()) seen_[key] = t + i;
        pixels_.push_back(found[i]);
        tokens[i] = found[i];
        logprobs[i] = scores[i];
    }
    draft_.clear();
    aside_ = false;
    return kept;
}

int64_t Drafts::following(int64_t* tokens) {
    const int64_t most = std::min(kMostRows, int64_t(uniform_.size()) - drawn());
    double chance = 1.0;
    int64_t count = 0;
    if (pixels_.empty()) throw std::invalid_argument("drafts: nothing has been drawn");
    tokens[count++] = pixels_.back();
    draft_.clear();
    aside_ = false;
    while (count < most && !aside_) {
        const Guess next = guess();
        if (next.kind >= 0) chance *= hits_[next.kind].hits / hits_[next.kind].tries;
        draft_.push_back(next);
        if ((aside_ = chance < kLeastChance)) break;
        tokens[count++] = next.token;
        pixels_.push_back(next.token);
    }
    pixels_.resize(pixels_.size() - draft_.size() + aside_);
    return count;
}

Drafts::Keys Drafts::neighbours() const {
    const int64_t at = int64_t(pixels_.size()), column = at % width_;
    const int64_t left = column ? pixels_[at - 1] : -1;
    int64_t above = -1, right = -1, corner = -1;
    if (at >= width_) {
        above = pixels_[at - width_];
        if (column < width_ - 1) right = pixels_[at - width_ + 1];
        if (column) corner = pixels_[at - width_ - 1];
    }
    const uint64_t two = mixed(mixed(1, left), above);
    return {mixed(mixed(two, right), corner), two};
}

Drafts::Guess Drafts::guess() const {
    const int64_t at = int64_t(pixels_.size()), t = at - given_;
    if (!known_.empty() && known_[t] >= 0) return {known_[t], -1};
    const int64_t above = at >= width_ ? pixels_[at - width_] : 0;
    const bool there = t >= last_from_ && t < last_from_ + int64_t(last_.size());
    const int64_t last = there ? last_[t - last_from_] : -1;
    int kind = 0;
    for (const uint64_t key : neighbours()) {
        ++kind;
        const auto found = seen_.find(key);
        if (found == seen_.end()) continue;
        const Guess next = by_distribution(found->second, t, kind);
        const int agrees = there ? 1 + (last == next.token) : 0;
        return {next.token, (next.kind * 3 + agrees) * 2 + (above == next.token)};
    }
    return {there ? last : above, there ? (above == last ? 2 : 1) : 0};
}

// What a pixel's number draws from the distribution that another was drawn from. The kind tells how far the number is
// from where it would be another token's.
Drafts::Guess Drafts::by_distribution(int64_t seen, int64_t t, int kind) const {
    if (cumulative_.empty()) return {pixels_[given_ + seen], 4 * kind};
    const double* weights = cumulative_.data() + seen * settings_.k;
    const double total = weights[settings_.k - 1], at = double(uniform_[t]) * total;
    if (std::isnan(total)) return {0, 4 * kind};
    const int64_t token =
        std::min<int64_t>(std::upper_bound(weights, weights + settings_.k, at) - weights, settings_.k - 1);
    const double margin = std::min(weights[token] - at, token ? at - weights[token - 1] : total) / total;
    return {token, 4 * kind + (margin > 0.1 ? 0 : margin > 0.03 ? 1 : margin > 0.01 ? 2 : 3)};
}

}  // namespace igpt::cpu
