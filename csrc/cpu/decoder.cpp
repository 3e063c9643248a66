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
#include "denormals.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace igpt::cpu {
namespace {

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

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
    }

    void step(const int64_t* tokens, float* logits) {
        const FlushDenormals flush;
        embed(tokens);
        meet();
        for (int64_t i = 0; i < w_.shape.layers; ++i) layer(i);
        const int64_t colours = w_.shape.vocab - 1;
        const Range own = share(w_.head());
        multiply(w_.head(), normed(w_.norm()), own, d_.logits_, Then::store, start(w_.layer(0).qkv, qkv_share(0)));
        const int64_t end = std::min(own.end, colours);
        for (int64_t b = 0; b < d_.batch_ && own.begin < end; ++b)
            std::copy(d_.logits_ + b * w_.head().n + own.begin, d_.logits_ + b * w_.head().n + end,
                      logits + b * colours + own.begin);
    }

  private:
    struct Range {
        int64_t begin, end;
    };

    void meet() { barrier_.wait(count_); }

    Range part(int64_t units) const { return {units * index_ / count_, units * (index_ + 1) / count_}; }

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
        const Range rows = part(d_.batch_);
        for (int64_t b = rows.begin; b < rows.end; ++b)
            w_.kernels.sum(w_.wte() + tokens[b] * embd, w_.wpe() + d_.position_ * embd, embd, d_.x_ + b * d_.width_);
    }

    Rows rows_of(const float* x, int64_t ld, int64_t k) const {
        const Rows rows{x, ld, d_.batch_, scratch_.high, scratch_.low, scratch_.half, scratch_.scale, scratch_.tiles};
        w_.kernels.split(rows, k, w_.shape.format);
        return rows;
    }

    Rows normed(const float* weight) const {
        const int64_t embd = w_.shape.embd;
        for (int64_t b = 0; b < d_.batch_; ++b)
            w_.kernels.norm(d_.x_ + b * d_.width_, weight, embd, w_.shape.eps, scratch_.normed + b * d_.width_);
        return rows_of(scratch_.normed, d_.width_, embd);
    }

    void multiply(const Matrix& m, const Rows& rows, Range range, float* y, Then then, const char* next) const {
        const int64_t ld = &m == &w_.head() ? m.n : y == d_.x_ ? d_.width_ : m.n;
        w_.kernels.linear({&m, &rows, y, ld, then, range.begin, range.end, scratch_.sums, next});
    }

    void expect(int64_t layer, int64_t unit) const {
        AttentionParams p = d_.head_of(layer, unit);
        p.position = d_.position_;
        w_.kernels.expect(p);
    }

    void attend(int64_t layer, const char* next) const {
        const int64_t batch = d_.batch_, dim = w_.shape.head_dim(), width = w_.layer(layer).qkv.n;
        const Range units = own_heads_ ? Range{part(w_.shape.heads).begin * batch, part(w_.shape.heads).end * batch}
                                       : part(w_.shape.heads * batch);
        for (int64_t u = units.begin; u < units.end; ++u) {
            const int64_t head = u / batch, b = u % batch;
            AttentionParams p = d_.head_of(layer, u);
            p.q = d_.qkv_ + b * width + head * 3 * dim;
            p.k = p.q + dim;
            p.v = p.k + dim;
            p.out = d_.mixed_ + b * w_.shape.embd + head * dim;
            p.position = d_.position_;
            p.next = u + 1 < units.end ? d_.head_of(layer, u + 1).keys : next;
            if (u + 1 < units.end) expect(layer, u + 1);
            w_.kernels.remember(p);
            w_.kernels.attend(p);
        }
    }

    void layer(int64_t i) {
        const DecoderWeights::Layer& l = w_.layer(i);
        const Range proj = share(l.proj), fc = share(l.fc), fc_proj = share(l.fc_proj), qkv = qkv_share(i);
        const char* next =
            i + 1 < w_.shape.layers ? start(w_.layer(i + 1).qkv, qkv_share(i + 1)) : start(w_.head(), share(w_.head()));
        const int64_t first_unit =
            part(w_.shape.heads * (own_heads_ ? 1 : d_.batch_)).begin * (own_heads_ ? d_.batch_ : 1);
        const bool idle = first_unit >= w_.shape.heads * d_.batch_;
        if (!idle) expect(i, first_unit);
        multiply(l.qkv, normed(l.norm_1), qkv, d_.qkv_, Then::store,
                 idle ? start(l.proj, proj) : d_.head_of(i, first_unit).keys);
        if (!own_heads_) meet();
        attend(i, start(l.proj, proj));
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
};

Decoder::Decoder(std::shared_ptr<const DecoderWeights> weights, int64_t batch, int64_t capacity)
    : weights_(std::move(weights)), batch_(batch), capacity_(capacity) {
    const DecoderShape& s = weights_->shape;
    const DecoderKernels& kernels = weights_->kernels;
    if (batch < 1 || batch > (1 << 20) || capacity < 1 || capacity > s.positions)
        throw std::invalid_argument("decoder: batch " + std::to_string(batch) + ", capacity " +
                                    std::to_string(capacity) + " is out of range");
    const int64_t dim = s.head_dim(), size = format_bytes(s.format), tiled = padded(capacity, kernels.tile);
    key_bytes_ = padded(tiled * dim * size, 64);
    unit_bytes_ = key_bytes_ + padded(padded(capacity, value_rows) * padded(dim, kernels.lanes) * size, 64);
    unit_scales_ = 3 * padded(tiled, 16);
    const int64_t units = s.layers * s.heads * batch;
    cache_ = Arena(size_t(units * unit_bytes_));
    if (s.format == Format::int8) scales_ = Arena(size_t(units * unit_scales_) * sizeof(float));

    width_ = weights_->layer(0).proj.n;
    const DecoderWeights::Layer& l = weights_->layer(0);
    const int64_t widths[] = {width_, l.qkv.n, s.embd, l.fc.n, weights_->head().n};
    size_t bytes = 0;
    for (int64_t width : widths) bytes += Arena::bytes<float>(batch * width);
    shared_ = Arena(bytes);
    float** rows[] = {&x_, &qkv_, &mixed_, &inner_, &logits_};
    for (int i = 0; i < 5; ++i) *rows[i] = shared_.take<float>(batch * widths[i]);
}

AttentionParams Decoder::head_of(int64_t layer, int64_t unit) const {
    const DecoderShape& s = weights_->shape;
    const int64_t index = layer * s.heads * batch_ + unit;
    AttentionParams p{};
    p.keys = cache_.data() + index * unit_bytes_;
    p.values = p.keys + key_bytes_;
    if (s.format == Format::int8) {
        const int64_t each = unit_scales_ / 3;
        p.key_scale = reinterpret_cast<float*>(scales_.data()) + index * unit_scales_;
        p.value_scale = p.key_scale + each;
        p.key_sums = reinterpret_cast<int32_t*>(p.value_scale + each);
    }
    p.head_dim = s.head_dim();
    p.scale = weights_->layer(layer).scale;
    p.format = s.format;
    p.next = p.keys;
    return p;
}

void Decoder::reserve(int threads) {
    if (int(scratch_.size()) >= threads) return;
    const int64_t widest = std::max(width_, weights_->layer(0).fc.n), tile = weights_->kernels.tile;
    const size_t each = Arena::bytes<float>(batch_ * width_) + 2 * Arena::bytes<uint8_t>(batch_ * widest) +
                        Arena::bytes<uint16_t>(batch_ * widest) + Arena::bytes<float>(batch_) +
                        Arena::bytes<float>(sums_rows(batch_) * 2 * tile) +
                        Arena::bytes<char>(tiles_bytes(batch_, widest));
    scratch_.clear();
    scratch_block_ = Arena(each * size_t(threads));
    for (int t = 0; t < threads; ++t) {
        Scratch s{};
        s.normed = scratch_block_.take<float>(batch_ * width_);
        s.high = scratch_block_.take<uint8_t>(batch_ * widest);
        s.low = scratch_block_.take<uint8_t>(batch_ * widest);
        s.half = scratch_block_.take<uint16_t>(batch_ * widest);
        s.scale = scratch_block_.take<float>(batch_);
        s.sums = scratch_block_.take<float>(sums_rows(batch_) * 2 * tile);
        s.tiles = scratch_block_.take<char>(tiles_bytes(batch_, widest));
        scratch_.push_back(s);
    }
}

void Decoder::check_free(int64_t count) const {
    if (count < 0 || position_ + count > capacity_)
        throw std::out_of_range("decoder: " + std::to_string(position_ + count) +
                                " positions do not fit into capacity " + std::to_string(capacity_));
}

void Decoder::step(const int64_t* tokens, float* logits, int threads) {
    const Busy busy(busy_);
    check_free(1);
    for (int64_t b = 0; b < batch_; ++b)
        if (tokens[b] < 0 || tokens[b] >= weights_->shape.vocab)
            throw std::invalid_argument("decoder: token " + std::to_string(tokens[b]) + " is not in 0.." +
                                        std::to_string(weights_->shape.vocab - 1));
    const int wanted = usable_threads(threads);
    reserve(wanted);
    Barrier barrier;
    // Nothing in the region throws: an exception that leaves it ends the process. It may get fewer threads than wanted.
#pragma omp parallel num_threads(wanted) if (wanted > 1)
    {
#ifdef _OPENMP
        const int index = omp_get_thread_num(), count = omp_get_num_threads();
#else
        const int index = 0, count = 1;
#endif
        Worker(*this, barrier, index, count).step(tokens, logits);
    }
    ++position_;
}

void Decoder::load(int64_t layer, const float* keys, const float* values, int64_t count, int threads) {
    const Busy busy(busy_);
    check_free(count);
    if (position_ != 0 || layer < 0 || layer >= weights_->shape.layers)
        throw std::invalid_argument("decoder: keys and values are loaded into an empty cache, layer by layer");
    const int64_t heads = weights_->shape.heads, dim = weights_->shape.head_dim(), units = heads * batch_;
    const int wanted = usable_threads(threads);
#pragma omp parallel for schedule(static) num_threads(wanted) if (wanted > 1)
    for (int64_t u = 0; u < units; ++u) {
        AttentionParams p = head_of(layer, u);
        const int64_t from = (u % batch_ * heads + u / batch_) * count * dim;
        for (p.position = 0; p.position < count; ++p.position) {
            p.k = keys + from + p.position * dim;
            p.v = values + from + p.position * dim;
            weights_->kernels.remember(p);
        }
    }
}

void Decoder::advance(int64_t count) {
    check_free(count);
    position_ += count;
}

void Decoder::rewind(int64_t position) {
    if (position < 0 || position > position_) throw std::invalid_argument("decoder: rewind goes back only");
    position_ = position;
}

}  // namespace igpt::cpu
