// The decoder's driver: memory, threads, and the order of a step.
//
//   x = wte[token] + wpe[position]
//   per layer:  qkv = norm(x) Wqkv                | own outputs, or own heads
//               mixed = softmax(q K^T) V          | own heads          barrier
//               x += mixed Wproj                  | own outputs        barrier
//               inner = act(norm(x) Wfc)          | own outputs        barrier
//               x += inner Wfc_proj               | own outputs        barrier
//   logits = norm(x) Whead                        | own outputs
//
// Every output is computed by one thread, in one order, so results do not depend on the number of threads. Norms are
// computed by every thread for itself: cheaper than to meet. When the heads divide evenly, a thread computes q, k, v of
// its own heads and needs no barrier before attending.
//
// Bound by reading the weights and the cache (batch 1), by multiply-adds at larger batches.
#include "decoder.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "barrier.h"
#include "region.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kMaxBatch = 1 << 20;

struct Busy {
    explicit Busy(std::atomic<bool>& flag) : flag_(flag) {
        if (flag_.exchange(true)) throw std::logic_error("decoder: another thread is inside this decoder");
    }
    ~Busy() { flag_.store(false); }
    std::atomic<bool>& flag_;
};

}  // namespace

// One thread's part of a step.
class Worker {
  public:
    Worker(Decoder& decoder, Barrier& barrier, int index, int count)
        : d_(decoder),
          w_(*decoder.weights_),
          barrier_(barrier),
          scratch_(decoder.scratch_[size_t(index)]),
          index_(index),
          count_(count) {
        const DecoderShape& s = w_.shape;
        const int64_t outputs = 3 * s.head_dim() * (s.heads / count_);
        own_heads_ = s.heads % count_ == 0 && outputs % w_.kernels.lanes == 0;
        // As few groups as there can be or, where the heads do not divide evenly, enough to share them out.
        const int64_t pairs = (d_.copies_ + 1) / 2, shares = (4 * count_ - 1) / (s.heads * d_.primers_) + 1;
        groups_ = (d_.copies_ + shared_rows - 1) / shared_rows;
        if (!own_heads_) groups_ = std::max(groups_, std::min(pairs, shares));
    }

    void step(const int64_t* tokens, float* logits) {
        embed(tokens);
        meet();
        for (int64_t i = 0; i < w_.shape.layers; ++i) layer(i);
        const int64_t colours = w_.shape.vocab - 1;
        const Range own = share(w_.head());
        multiply(w_.head(), normed(w_.norm()), own, d_.logits_, Then::store, start(w_.layer(0).qkv, qkv_share(0)));
        const int64_t end = std::min(own.end, colours);
        for (int64_t b = 0; b < d_.count_ && own.begin < end; ++b)
            std::copy(d_.logits_ + b * w_.head().n + own.begin, d_.logits_ + b * w_.head().n + end,
                      logits + b * colours + own.begin);
    }

  private:
    void meet() { barrier_.wait(count_); }

    bool in_one_sequence() const { return d_.batch_ == 1; }
    int64_t position(int64_t row) const { return d_.position_ + (in_one_sequence() ? row : 0); }

    Range part(int64_t units) const { return cpu::part(units, index_, count_); }

    Range share(const Matrix& m) const {
        const Range registers = part(m.n / w_.kernels.lanes);
        return {registers.begin * w_.kernels.lanes, registers.end * w_.kernels.lanes};
    }

    Range qkv_share(int64_t layer) const {
        if (!own_heads_) return share(w_.layer(layer).qkv);
        const Range heads = part(w_.shape.heads);
        return {heads.begin * 3 * w_.shape.head_dim(), heads.end * 3 * w_.shape.head_dim()};
    }

    // Where the thread begins to read a matrix.
    const char* start(const Matrix& m, Range range) const {
        const int64_t tile = w_.kernels.tile;
        return m.data + range.begin / tile * tile * m.k * format_bytes(m.format);
    }

    void embed(const int64_t* tokens) {
        const int64_t embd = w_.shape.embd;
        const Range rows = part(d_.count_);
        for (int64_t b = rows.begin; b < rows.end; ++b)
            w_.kernels.sum(w_.wte() + tokens[b] * embd, w_.wpe() + position(b) * embd, embd, d_.x_ + b * d_.width_);
    }

    Rows rows_of(const float* x, int64_t ld, int64_t k) const {
        const Rows rows{x, ld, d_.count_, scratch_.high, scratch_.low, scratch_.half, scratch_.scale, scratch_.tiles};
        w_.kernels.split(rows, k, w_.shape.format);
        return rows;
    }

    Rows normed(const float* weight) const {
        const int64_t embd = w_.shape.embd;
        for (int64_t b = 0; b < d_.count_; ++b)
            w_.kernels.norm(d_.x_ + b * d_.width_, weight, embd, w_.shape.eps, scratch_.normed + b * d_.width_);
        return rows_of(scratch_.normed, d_.width_, embd);
    }

    void multiply(const Matrix& m, const Rows& rows, Range range, float* y, Then then, const char* next) const {
        const int64_t ld = &m == &w_.head() ? m.n : y == d_.x_ ? d_.width_ : m.n;
        w_.kernels.linear({&m, &rows, y, ld, then, range.begin, range.end, scratch_.sums, next});
    }

    // A unit is a head of one sequence or, after a fork, of a group of a primer's sequences.
    Range attention_units() const {
        const int64_t heads = w_.shape.heads, each = d_.primers_ * groups_;
        if (!own_heads_) return part(heads * each);
        return {part(heads).begin * each, part(heads).end * each};
    }

    // Where a unit begins to read.
    const char* start(int64_t layer, int64_t unit) const {
        return d_.copies_ == 1 ? d_.head_of(layer, unit).keys : d_.primer_of(layer, unit / groups_).keys;
    }

    // Sequences `first` .. `first` + `count` - 1, of which `unit` is the primer's head.
    struct Group {
        int64_t unit, head, first, count;
    };

    Group group(int64_t u) const {
        const int64_t copies = d_.copies_, unit = u / groups_, index = u % groups_;
        const int64_t begin = copies * index / groups_, end = copies * (index + 1) / groups_;
        return {unit, unit / d_.primers_, unit % d_.primers_ * copies + begin, end - begin};
    }

    // Of `row`, which is a sequence, or a position of the only one.
    AttentionDecodeParams head_of(int64_t layer, int64_t head, int64_t row) const {
        const int64_t dim = w_.shape.head_dim(), sequence = in_one_sequence() ? 0 : row;
        AttentionDecodeParams p = d_.head_of(layer, head * d_.batch_ + sequence);
        p.q = d_.qkv_ + row * w_.layer(layer).qkv.n + head * 3 * dim;
        p.k = p.q + dim;
        p.v = p.k + dim;
        p.out = d_.mixed_ + row * w_.shape.embd + head * dim;
        p.position = position(row) - d_.shared_;
        return p;
    }

    void expect(int64_t layer, int64_t u) const {
        const Group g = group(u);
        for (int64_t i = 0; i < g.count; ++i) w_.kernels.expect(head_of(layer, g.head, g.first + i));
    }

    // A row is remembered when those before it have attended: none sees what follows it, be it infinite.
    void attend_in_turn(int64_t layer, int64_t head, const char* next) const {
        for (int64_t row = 0; row < d_.count_; ++row) {
            AttentionDecodeParams p = head_of(layer, head, row);
            p.next = row + 1 < d_.count_ ? p.keys : next;
            w_.kernels.remember(p);
            w_.kernels.attention_decode(p);
        }
    }

    void attention_decode(int64_t layer, const char* next) const {
        const Range units = attention_units();
        for (int64_t u = units.begin; u < units.end; ++u) {
            const Group g = group(u);
            const char* after = u + 1 < units.end ? start(layer, u + 1) : next;
            if (u + 1 < units.end) expect(layer, u + 1);
            if (in_one_sequence()) {
                attend_in_turn(layer, g.head, after);
                continue;
            }
            AttentionDecodeParams sequences[shared_rows];
            for (int64_t i = 0; i < g.count; ++i) {
                sequences[i] = head_of(layer, g.head, g.first + i);
                sequences[i].next = after;
                w_.kernels.remember(sequences[i]);
                if (i > 0) sequences[i - 1].next = sequences[i].keys;
            }
            if (d_.copies_ == 1) {
                w_.kernels.attention_decode(sequences[0]);
                continue;
            }
            AttentionDecodeParams primer = d_.primer_of(layer, g.unit);
            primer.next = sequences[0].keys;
            w_.kernels.attention_decode_prefix(primer, sequences, g.count);
        }
    }

    void layer(int64_t i) {
        const DecoderWeights::Layer& l = w_.layer(i);
        const Range proj = share(l.proj), fc = share(l.fc), fc_proj = share(l.fc_proj), qkv = qkv_share(i);
        const char* next =
            i + 1 < w_.shape.layers ? start(w_.layer(i + 1).qkv, qkv_share(i + 1)) : start(w_.head(), share(w_.head()));
        const Range units = attention_units();
        if (units.begin < units.end) expect(i, units.begin);
        multiply(l.qkv, normed(l.norm_1), qkv, d_.qkv_, Then::store,
                 units.begin < units.end ? start(i, units.begin) : start(l.proj, proj));
        if (!own_heads_) meet();
        attention_decode(i, start(l.proj, proj));
        meet();
        multiply(l.proj, rows_of(d_.mixed_, w_.shape.embd, w_.shape.embd), proj, d_.x_, Then::add, start(l.fc, fc));
        meet();
        multiply(l.fc, normed(l.norm_2), fc, d_.inner_, w_.shape.activation, start(l.fc_proj, fc_proj));
        meet();
        multiply(l.fc_proj, rows_of(d_.inner_, l.fc.n, w_.shape.inner), fc_proj, d_.x_, Then::add, next);
        meet();
    }

    Decoder& d_;
    const DecoderWeights& w_;
    Barrier& barrier_;
    const Decoder::Scratch& scratch_;
    const int index_, count_;
    bool own_heads_;
    int64_t groups_;  // of the sequences of a primer
};

Decoder::Decoder(std::shared_ptr<const DecoderWeights> weights, int64_t batch, int64_t capacity)
    : weights_(std::move(weights)), primers_(batch), capacity_(capacity), batch_(batch) {
    if (batch < 1 || batch > kMaxBatch || capacity < 1 || capacity > weights_->shape.positions)
        throw std::invalid_argument("decoder: batch " + std::to_string(batch) + ", capacity " +
                                    std::to_string(capacity) + " is out of range");
    width_ = weights_->layer(0).proj.n;
    own_ = make_cache(batch, capacity);
    make_rows(batch);
}

KvCache Decoder::make_cache(int64_t sequences, int64_t capacity) const {
    const DecoderShape& s = weights_->shape;
    return {weights_->kernels, s.format, s.head_dim(), s.layers * s.heads * sequences, capacity};
}

void Decoder::make_rows(int64_t rows) {
    const DecoderWeights::Layer& l = weights_->layer(0);
    const int64_t widths[] = {width_, l.qkv.n, weights_->shape.embd, l.fc.n, weights_->head().n};
    size_t bytes = 0;
    for (int64_t width : widths) bytes += Arena::bytes<float>(rows * width);
    rows_ = Arena(bytes);
    float** to[] = {&x_, &qkv_, &mixed_, &inner_, &logits_};
    for (int i = 0; i < 5; ++i) *to[i] = rows_.take<float>(rows * widths[i]);
    scratch_.clear();
    room_ = rows;
}

AttentionDecodeParams Decoder::unit_of(const KvCache& cache, int64_t layer, int64_t units, int64_t unit) const {
    AttentionDecodeParams p{};
    cache.point(layer * units + unit, p);
    p.head_dim = weights_->shape.head_dim();
    p.scale = weights_->layer(layer).scale;
    p.format = weights_->shape.format;
    p.next = p.keys;
    return p;
}

AttentionDecodeParams Decoder::head_of(int64_t layer, int64_t unit) const {
    return unit_of(own_, layer, weights_->shape.heads * batch_, unit);
}

AttentionDecodeParams Decoder::primer_of(int64_t layer, int64_t unit) const {
    AttentionDecodeParams p = unit_of(primer_, layer, weights_->shape.heads * primers_, unit);
    p.position = shared_ - 1;
    return p;
}

void Decoder::reserve(int threads) {
    if (int(scratch_.size()) >= threads) return;
    const int64_t widest = std::max(width_, weights_->layer(0).fc.n), tile = weights_->kernels.tile;
    std::vector<Scratch> fresh(static_cast<size_t>(threads));
    scratch_block_ = Arena::of([&](Arena& block) {
        for (Scratch& s : fresh) {
            s.normed = block.take<float>(room_ * width_);
            s.high = block.take<uint8_t>(room_ * widest);
            s.low = block.take<uint8_t>(room_ * widest);
            s.half = block.take<uint16_t>(room_ * widest);
            s.scale = block.take<float>(room_);
            s.sums = block.take<float>(sums_rows(room_) * 2 * tile);
            s.tiles = block.take<char>(tiles_bytes(room_, widest));
        }
    });
    scratch_ = std::move(fresh);
}

void Decoder::check_free(int64_t count) const {
    if (count < 0 || count > capacity_ - position_)
        throw std::out_of_range("decoder: " + std::to_string(count) + " positions behind " + std::to_string(position_) +
                                " do not fit into capacity " + std::to_string(capacity_));
}

void Decoder::check_tokens(const int64_t* tokens, int64_t count) const {
    for (int64_t b = 0; b < count; ++b)
        if (tokens[b] < 0 || tokens[b] >= weights_->shape.vocab)
            throw std::invalid_argument("decoder: token " + std::to_string(tokens[b]) + " is not in 0.." +
                                        std::to_string(weights_->shape.vocab - 1));
}

void Decoder::step(const int64_t* tokens, float* logits, int threads) {
    const Busy busy(busy_);
    check_free(1);
    check_tokens(tokens, batch_);
    count_ = batch_;
    run(tokens, logits, threads);
    ++position_;
}

void Decoder::step_rows(const int64_t* tokens, int64_t count, float* logits, int threads) {
    const Busy busy(busy_);
    if (batch_ != 1) throw std::logic_error("decoder: several positions are read of a single sequence alone");
    if (count < 1) throw std::invalid_argument("decoder: " + std::to_string(count) + " rows are out of range");
    check_free(count);
    check_tokens(tokens, count);
    if (count > room_) make_rows(std::min(capacity_, std::max(count, 2 * room_)));
    count_ = count;
    run(tokens, logits, threads);
    position_ += count;
}

void Decoder::run(const int64_t* tokens, float* logits, int threads) {
    const int wanted = usable_threads(threads);
    reserve(wanted);
    Barrier barrier;
    in_region(wanted, [&](int index, int count) { Worker(*this, barrier, index, count).step(tokens, logits); });
}

void Decoder::load(int64_t layer, const float* keys, const float* values, int64_t count, int threads) {
    const Busy busy(busy_);
    check_free(count);
    if (position_ != 0 || layer < 0 || layer >= weights_->shape.layers)
        throw std::invalid_argument("decoder: keys and values are loaded into an empty cache, layer by layer");
    const int64_t heads = weights_->shape.heads, dim = weights_->shape.head_dim(), units = heads * batch_;
    for_each(units, usable_threads(threads), [&](int64_t u) {
        AttentionDecodeParams p = head_of(layer, u);
        const int64_t from = (u % batch_ * heads + u / batch_) * count * dim;
        for (p.position = 0; p.position < count; ++p.position) {
            p.k = keys + from + p.position * dim;
            p.v = values + from + p.position * dim;
            weights_->kernels.remember(p);
        }
    });
}

void Decoder::advance(int64_t count) {
    const Busy busy(busy_);
    check_free(count);
    position_ += count;
}

void Decoder::fork(int64_t copies, int threads) {
    const Busy busy(busy_);
    if (forked_) throw std::logic_error("decoder: it has been forked before");
    if (position_ == 0) throw std::logic_error("decoder: nothing has been read that a fork could share");
    if (copies < 1 || copies > kMaxBatch / primers_)
        throw std::invalid_argument("decoder: " + std::to_string(copies) + " copies are out of range");
    if (copies == 1) {
        forked_ = true;
        return;
    }
    // The old cache goes when the new ones are there; memory of theirs that is not written yet takes no room.
    KvCache primer = make_cache(primers_, position_), own = make_cache(primers_ * copies, capacity_ - position_);
    make_rows(primers_ * copies);
    const int64_t units = weights_->shape.layers * weights_->shape.heads * primers_;
    for_each(units, usable_threads(threads), [&](int64_t u) { primer.copy(u, own_); });
    primer_ = std::move(primer);
    own_ = std::move(own);
    forked_ = true;
    shared_ = position_;
    copies_ = copies;
    batch_ = primers_ * copies;
}

void Decoder::rewind(int64_t position) {
    const Busy busy(busy_);
    if (position < shared_ || position > position_)
        throw std::invalid_argument("decoder: rewind goes back only, and to a fork at most");
    // The values of a group that stays in use must be zero where they are forgotten.
    const std::vector<float> zeros(size_t(weights_->shape.head_dim()));
    const int64_t units = weights_->shape.heads * batch_, first = position - shared_;
    const int64_t end = std::min(padded(first, value_rows), position_ - shared_);
    for (int64_t layer = 0; layer < weights_->shape.layers; ++layer)
        for (int64_t u = 0; u < units; ++u) {
            AttentionDecodeParams p = head_of(layer, u);
            p.k = p.v = zeros.data();
            for (p.position = first; p.position < end; ++p.position) weights_->kernels.remember(p);
        }
    position_ = position;
}

}  // namespace igpt::cpu
