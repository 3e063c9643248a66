// Exact speculation: one image's pixels are guessed ahead, read in one step, and drawn as if they had come one by one.
//
// A draft is kept as far as it is what the model draws there with the very number that is the pixel's own, so that the
// image is the one that would have been drawn without, bit for bit. A guess costs a row of a step, less than a step.
//
// Where a pixel's neighbours (left, above, above left and right) have stood together before in this image, the guess is
// what the pixel's number draws from the distribution that the model had there; where they have not, the same by two of
// them; else what the last step has drawn there, after a draft that was wrong before it; else the pixel above. Every
// kind of guess keeps its own rate of hits; a draft ends where the chance that it is right to its end falls below
// kLeastChance. The guess behind it is compared with what is drawn all the same: where nothing can be foreseen, hardly
// a row is wasted, and where something can again, it shows.
#pragma once

#include <array>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "sample.h"

namespace igpt::cpu {

constexpr int64_t kMostRows = 16;     // of a step
constexpr double kLeastChance = 0.4;  // about what a further row costs, as a share of a step and all that is around it
constexpr double kMemory = 60.0;      // tries of a kind, after which older ones count half

class Drafts {
  public:
    // pixels: those that stand before the first drawn one. uniform, known: as of SampleParams, one a pixel to draw;
    // known is empty where all are drawn. width: pixels of a row of the image. settings: temperature, top_k, top_p,
    // min_score and k. Throws std::invalid_argument.
    Drafts(std::vector<int64_t> pixels, std::vector<float> uniform, std::vector<int64_t> known, int64_t width,
           const SampleParams& settings);

    // Draws from the (rows, k) logits that follow the last pixel and the draft behind it, `stride` numbers apart.
    // Returns how many of the pixels stand; these and their log-probabilities are written. Throws as `sample`, and
    // std::invalid_argument for rows that are not those of `following`.
    int64_t learn(const float* logits, int64_t stride, int64_t rows, int64_t* tokens, float* logprobs);

    // Makes a draft, and writes what the next step reads: the last pixel and the draft, kMostRows at most; returns how
    // many. Nothing has to read the last pixel of the image. Throws std::invalid_argument where there is no pixel yet.
    int64_t following(int64_t* tokens);

  private:
    struct Guess {
        int64_t token;
        int kind;  // -1: it is given
    };
    struct Hits {
        double hits = 1.0, tries = 2.0;
        void count(bool hit);
    };
    using Keys = std::array<uint64_t, 2>;

    int64_t drawn() const { return int64_t(pixels_.size()) - given_; }
    Keys neighbours() const;
    Guess guess() const;
    Guess by_distribution(int64_t seen, int64_t t, int kind) const;

    std::vector<int64_t> pixels_, known_;
    std::vector<float> uniform_;
    const int64_t given_, width_;
    const SampleParams settings_;
    std::unordered_map<uint64_t, int64_t> seen_;  // neighbours -> the drawn pixel that had them last
    std::vector<double> cumulative_;              // (pixels that stand, k): what each was drawn from
    std::vector<int64_t> last_;  // what the last step has drawn after a wrong draft, from last_from_ on
    int64_t last_from_ = 0;
    std::array<Hits, 72> hits_;
    std::vector<Guess> draft_;  // and the guess behind it, if `aside_`
    bool aside_ = false;
};

}  // namespace igpt::cpu
