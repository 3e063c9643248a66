// The forward pass's driver: memory, threads, and the order of the work.
//
//   x = wte[token] + wpe[position]                                         | own rows
//   per layer:  q, k, v = norm(x) Wqkv                                     | own rows     barrier
//               mixed = softmax(q K^T) V                                   | own queries  barrier
//               x += mixed Wproj; x += act(norm(x) Wfc) Wfc_proj           | own rows
//
// States that are taken on the way are copied where a layer begins, by whom the rows are. Their means are made beside
// the attention, while all threads' rows stand as the layer found them: a thread has some columns of some parts of
// sequences.
//
// A thread takes a span of rows, kSpanRows at a time through everything between two attentions, so that a span's
// activations stay in its own cache. Where there are fewer rows than that makes sense for, several threads form a team
// that shares rows and divides outputs; a team has a barrier of its own. Queries are divided so that every thread has
// the same number of scores. Every number is computed by one thread, in one order: results do not depend on how many
// there are.
//
// Long batches go through all layers some sequences at a time: activations take kMostRows positions, or a sequence.
#include "forward.h"

#include <algorithm>
#include <array>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "barrier.h"
#include "region.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kSpan = 512 << 10;  // bytes: of a span's activations, and of a slice of `inner`
constexpr int64_t kSlice = 512;       // outputs of fc, inputs of fc_proj, at a time
constexpr int64_t kTeamRows = 128;    // of a team at least, before there is a second one
constexpr int64_t kMostRows = 2048;
constexpr int64_t kMostPositions = int64_t{1} << 40;  // of a call: sizes beyond are no memory's

// Rows of a span: fewer of wide ones.
int64_t span_rows(const DecoderShape& s, Format activations) {
    const int64_t bytes = kSlice * format_bytes(activations);
    return std::max(kRows, std::min(kSpan / bytes, kSpan * kSlice / bytes / s.embd / kRows * kRows));
}

// Where number `index` of an array of a format is.
char* at(void* numbers, Format format, int64_t index) {
    return static_cast<char*>(numbers) + index * format_bytes(format);
}

// What a product reads, with the scale of each row where it is rounded.
struct Inputs {
    const char* tiles;
    const float* scale;
};

// Room for it.
struct Rounded {
    char* tiles;
    float* scale;
};

}  // namespace

// Activations of some sequences.
struct Forward::Space {
    Space(const DecoderShape& s, const ForwardKernels& kernels, int64_t rows_, int threads_)
        : rows(rows_),
          threads(threads_),
          inner(size_t(threads)),
          qkv(size_t(threads)),
          sums(size_t(threads)),
          rounded(size_t(threads)) {
        const int64_t embd = padded(s.embd, 32), qkv_width = padded(3 * s.embd, 32);
        const int64_t dim = padded(s.head_dim(), 32), heads = rows * s.heads, bytes = format_bytes(kernels.activations);
        const int64_t span = std::min(rows, span_rows(s, kernels.activations));
        arena = Arena::of([&](Arena& block) {
            x = block.take<float>(rows * embd);
            normed = block.take<char>(rows * embd * bytes);
            mixed = block.take<char>(rows * embd * bytes);
            for (char** packed : {&q, &k, &v}) *packed = block.take<char>(heads * dim * bytes);
            flaws = block.take<uint32_t>(heads * dim / 32);
            flawed = block.take<uint8_t>(heads / kRows);
            for (size_t t = 0; t < inner.size(); ++t) {
                inner[t] = block.take<char>(span * kSlice * bytes);
                qkv[t] = block.take<char>(span * qkv_width * bytes);
                sums[t] = block.take<float>(span * 64);
                if (kernels.round == nullptr) continue;
                for (const bool of_inner : {false, true})
                    rounded[t][of_inner] = {
                        block.take<char>(span * (of_inner ? kSlice : padded(s.embd, 64)) * kernels.rounded),
                        block.take<float>(span)};
            }
        });
    }

    const int64_t rows;
    const int threads;
    Arena arena;
    float* x;
    char *normed, *mixed, *q, *k, *v;
    uint32_t* flaws;
    uint8_t* flawed;
    std::vector<char*> inner, qkv;  // of each team
    std::vector<float*> sums;       // of each thread
    // Of each team, what a product with int8 weights reads: of whole rows, and of a slice of `inner`.
    std::vector<std::array<Rounded, 2>> rounded;
};

// One thread's part of a forward pass of `count` sequences from `first` on.
class ForwardWorker {
  public:
    ForwardWorker(const Forward& forward, const ForwardParams& params, Forward::Space& space, Barrier* barriers,
                  int index, int count)
        : w_(*forward.weights_),
          kernels_(forward.kernels_),
          p_(params),
          s_(space),
          barriers_(barriers),
          index_(index),
          count_(count),
          positions_(padded(params.length, kRows)),
          embd_(padded(w_.shape.embd, 32)),
          dim_(padded(w_.shape.head_dim(), 32)),
          span_(span_rows(w_.shape, kernels_.activations)) {}

    void run(int64_t first, int64_t sequences) {
        first_ = first;
        sequences_ = sequences;
        const int64_t blocks = sequences * positions_ / kRows;
        int64_t teams = count_;
        while (count_ % teams != 0 || (teams > 1 && blocks * kRows < teams * kTeamRows)) --teams;
        members_ = count_ / teams;
        team_ = index_ / members_;
        member_ = index_ % members_;
        const Range own = part(blocks, team_, teams);
        barriers_[0].wait(count_);  // the rows of the sequences before may have been others'
        for (int64_t b = own.begin; b < own.end; b += span_ / kRows) embed(span(own, b));
        for (int64_t i = 0; i < p_.layers; ++i) {
            for (int64_t b = own.begin; b < own.end; b += span_ / kRows) {
                if (i > 0) mlp(i - 1, span(own, b));
                project(i, span(own, b));
            }
            barriers_[0].wait(count_);
            take_means(i);
            causal_attention(i);
            barriers_[0].wait(count_);
        }
        for (int64_t b = own.begin; b < own.end; b += span_ / kRows) {
            if (p_.layers > 0) mlp(p_.layers - 1, span(own, b));
            leave(span(own, b));
        }
        if (p_.means != nullptr && place(p_.layers) >= 0) {
            barriers_[0].wait(count_);
            take_means(p_.layers);
            barriers_[0].wait(count_);
        }
        for (int64_t b = own.begin; b < own.end && p_.last != nullptr; b += span_ / kRows) finish(span(own, b));
    }

  private:
    Range span(Range own, int64_t block) const {
        return {block * kRows, std::min(block + span_ / kRows, own.end) * kRows};
    }

    void meet_team() { barriers_[1 + team_].wait(int(members_)); }

    char* activation(char* numbers, int64_t index) const { return at(numbers, kernels_.activations, index); }

    // This member's part of a span, in whole blocks.
    Range share(Range rows) const {
        const Range blocks = part((rows.end - rows.begin) / kRows, member_, members_);
        return {rows.begin + blocks.begin * kRows, rows.begin + blocks.end * kRows};
    }

    // Calls visit(row, sequence, position) for the member's rows that are there.
    template <class Visit>
    void each_row(Range rows, Visit visit) const {
        const Range own = share(rows);
        for (int64_t row = own.begin; row < own.end; ++row)
            if (row % positions_ < p_.length) visit(row, first_ + row / positions_, row % positions_);
    }

    void embed(Range rows) const {
        const int64_t n = w_.shape.embd;
        const Range own = share(rows);
        for (int64_t row = own.begin; row < own.end; ++row) {
            const int64_t sequence = first_ + row / positions_, t = row % positions_;
            const bool there = t < p_.length;
            const int64_t token = there ? p_.tokens[sequence * p_.length + t] : 0;
            kernels_.embed(there ? w_.wte() + token * n : nullptr, w_.wpe() + t * n, n, embd_, row, s_.x);
        }
        // No meeting: the rows are this member's until `norm` has read them.
    }

    void norm(const float* weight, Range rows) const {
        const Range own = share(rows);
        kernels_.norm({s_.x, weight, w_.shape.embd, embd_, w_.shape.eps, own.begin, own.end - own.begin, s_.normed});
    }

    // What a product of a span reads: x, `n` numbers of each row, as they are; or rounded by the whole team, which then
    // meets. This member's share of the rows is there.
    Inputs inputs(const char* x, Range rows, int64_t n, bool of_inner = false) {
        if (kernels_.round == nullptr) return {x, nullptr};
        const Rounded& to = s_.rounded[size_t(team_)][of_inner];
        const Range own = share(rows);
        kernels_.round({x, n, own.begin - rows.begin, own.end - own.begin, to.tiles, to.scale});
        meet_team();
        return {to.tiles, to.scale};
    }

    // This member's outputs, of `n` from `first` on.
    GemmParams gemm(const Matrix& m, Inputs x, Range rows, int64_t n, Then then, const Matrix& next,
                    int64_t first = 0) const {
        GemmParams g{};
        g.matrix = &m;
        g.x = x.tiles;
        g.scale = x.scale;
        g.rows = rows.end - rows.begin;
        g.first = rows.begin;
        g.positions = positions_;
        g.width = padded(n, 32);
        const Range outputs = part(g.width / 32, member_, members_);
        g.begin = first + outputs.begin * 32;
        g.end = first + outputs.end * 32;
        g.first_output = first;
        g.depth = m.k;
        g.next = next.data;
        g.then = then;
        g.residual = s_.x + rows.begin * embd_;
        g.scratch = s_.sums[size_t(index_)];
        return g;
    }

    // x to q, k and v of layer i.
    void project(int64_t i, Range rows) {
        const DecoderWeights::Layer& l = w_.layer(i);
        norm(l.norm_1, rows);
        take_states(i, rows);
        const Inputs normed = inputs(activation(s_.normed, rows.begin * embd_), rows, w_.shape.embd);
        meet_team();
        GemmParams g = gemm(l.qkv, normed, rows, 3 * w_.shape.embd, Then::store, l.proj);
        g.plain = s_.qkv[size_t(team_)];
        kernels_.gemm(g);
        meet_team();
        const Range own = share(rows);
        for (int64_t row = own.begin; row < own.end; row += kRows)
            pack(i, row, activation(s_.qkv[size_t(team_)], (row - rows.begin) * g.width));
        meet_team();  // before the next span's
    }

    void pack(int64_t i, int64_t row, const char* qkv) const {
        const int64_t local = row / positions_, t = row % positions_, heads = w_.shape.heads, d = w_.shape.head_dim();
        HeadsParams h{};
        h.qkv = qkv;
        h.ld = padded(3 * w_.shape.embd, 32);
        h.head_dim = d;
        h.heads = heads;
        h.head_stride = positions_ * dim_;
        const int64_t first = local * heads * h.head_stride + t * dim_;
        h.q = activation(s_.q, first);
        h.k = activation(s_.k, first);
        h.v = activation(s_.v, first);
        h.flaw_stride = h.head_stride / 32;
        h.flaws = s_.flaws + first / 32;
        h.flawed_stride = positions_ / kRows;
        h.flawed = s_.flawed + local * heads * h.flawed_stride + t / kRows;
        h.seen = std::min(kRows, p_.length - t);
        h.cache = kernels_.states;
        if (p_.keys) {
            h.cache_stride = p_.length * d;
            const int64_t to = ((i * p_.batch + first_ + local) * heads * p_.length + t) * d;
            h.keys = at(p_.keys, h.cache, to);
            h.values = at(p_.values, h.cache, to);
        }
        kernels_.pack_heads(h);
    }

    // The blocks of queries, over all heads of all sequences, in which this thread's share of the scores lies.
    void causal_attention(int64_t i) const {
        const int64_t heads = w_.shape.heads, units = sequences_ * heads, blocks = positions_ / kRows;
        const int64_t each = blocks * (blocks + 1) / 2;
        const auto begin_in = [&](int64_t index, int64_t unit) {
            // The first block of a unit that thread `index` has: where its share of the scores begins.
            const int64_t target = units * each * index / count_ - unit * each;
            int64_t block = 0;
            while (block < blocks && block * (block + 1) / 2 < target) ++block;
            return block;
        };
        for (int64_t u = 0; u < units; ++u) {
            const Range own{begin_in(index_, u), begin_in(index_ + 1, u)};
            if (own.begin >= own.end) continue;
            const int64_t first = u * positions_ * dim_;
            AttentionBlocksParams a{};
            a.q = activation(s_.q, first);
            a.k = activation(s_.k, first);
            a.v = activation(s_.v, first);
            a.flaws = s_.flaws + first / 32;
            a.flawed = s_.flawed + u * blocks;
            a.head_dim = w_.shape.head_dim();
            a.scale = w_.layer(i).scale;
            a.begin = own.begin;
            a.end = own.end;
            a.tiles = activation(s_.mixed, u / heads * positions_ * embd_);
            a.column = u % heads * a.head_dim;
            a.width = embd_;
            a.columns = w_.shape.embd;
            kernels_.causal_attention(a);
        }
    }

    void mlp(int64_t i, Range rows) {
        const DecoderWeights::Layer& l = w_.layer(i);
        const int64_t n = w_.shape.embd;
        const Inputs mixed = inputs(activation(s_.mixed, rows.begin * embd_), rows, n);
        kernels_.gemm(gemm(l.proj, mixed, rows, n, Then::add, l.fc));
        meet_team();
        norm(l.norm_2, rows);
        const Inputs normed = inputs(activation(s_.normed, rows.begin * embd_), rows, n);
        meet_team();
        const int64_t bytes = format_bytes(w_.shape.format);
        const Matrix& after = i + 1 < w_.shape.layers ? w_.layer(i + 1).qkv : w_.layer(0).qkv;
        for (int64_t from = 0; from < w_.shape.inner; from += kSlice) {
            const int64_t count = std::min(kSlice, w_.shape.inner - from), to = from + kSlice;
            GemmParams g = gemm(l.fc, normed, rows, count, w_.shape.activation, l.fc_proj, from);
            g.tiles = s_.inner[size_t(team_)];
            g.next += from * w_.kernels.tile * bytes;
            kernels_.gemm(g);
            meet_team();
            const Inputs inner = inputs(s_.inner[size_t(team_)], rows, count, true);
            g = gemm(l.fc_proj, inner, rows, n, Then::add, to < w_.shape.inner ? l.fc : after);
            g.from = from;
            g.depth = count;
            if (to < w_.shape.inner) g.next += to * l.fc.k * bytes;
            kernels_.gemm(g);
            meet_team();
        }
    }

    // Where among those taken what lies behind `layers` layers is, or -1.
    int64_t place(int64_t layers) const {
        const int64_t* found = std::find(p_.taken, p_.taken + p_.takes, layers);
        return found == p_.taken + p_.takes ? -1 : found - p_.taken;
    }

    // Behind `layers` layers, of this member's rows, which the norm that comes next has been applied to.
    void take_states(int64_t layers, Range rows) const {
        const int64_t n = w_.shape.embd, which = p_.states == nullptr ? -1 : place(layers);
        if (which < 0) return;
        each_row(rows, [&](int64_t row, int64_t sequence, int64_t t) {
            const int64_t to = ((which * p_.batch + sequence) * p_.length + t) * n;
            char* out = at(p_.states, kernels_.states, to);
            p_.normed ? kernels_.tiles_row(s_.normed, n, embd_, row, out)
                      : kernels_.residual_row(s_.x, n, embd_, row, out);
        });
    }

    // Of all rows, this thread's share of the bands and columns.
    void take_means(int64_t layers) const {
        const int64_t which = p_.means == nullptr ? -1 : place(layers), columns = embd_ / 32;
        if (which < 0) return;
        const Range own = part(sequences_ * p_.bands * columns, index_, count_);
        for (int64_t unit = own.begin; unit < own.end; ++unit) {
            const int64_t sequence = unit / columns / p_.bands, band = unit / columns % p_.bands;
            MeanParams m{};
            m.n = w_.shape.embd;
            m.width = embd_;
            m.count = p_.length / p_.bands;
            m.first = sequence * positions_ + band * m.count;
            m.column = unit % columns * 32;
            m.out = p_.means + ((which * p_.batch + first_ + sequence) * p_.bands + band) * m.n;
            p_.normed ? kernels_.mean_tiles(s_.normed, m) : kernels_.mean_residual(s_.x, m);
        }
    }

    // Behind the last layer that runs, if it is taken.
    void leave(Range rows) {
        if (place(p_.layers) < 0) return;
        if (p_.normed) norm(p_.layers < w_.shape.layers ? w_.layer(p_.layers).norm_1 : w_.norm(), rows);
        take_states(p_.layers, rows);
    }

    void finish(Range rows) {
        const int64_t n = w_.shape.embd;
        norm(w_.norm(), rows);
        each_row(rows, [&](int64_t row, int64_t sequence, int64_t t) {
            kernels_.tiles_row(s_.normed, n, embd_, row, at(p_.last, kernels_.states, (sequence * p_.length + t) * n));
        });
    }

    const DecoderWeights& w_;
    const ForwardKernels& kernels_;
    const ForwardParams& p_;
    Forward::Space& s_;
    Barrier* const barriers_;  // everybody's, and each team's
    const int index_, count_;
    const int64_t positions_, embd_, dim_;  // padded
    const int64_t span_;
    int64_t first_ = 0, sequences_ = 0, members_ = 1, team_ = 0, member_ = 0;
};

namespace {

const ForwardKernels& kernels_for(const DecoderWeights& w) {
    if (w.kernels.pack != ops().decoder.pack)
        throw std::invalid_argument("forward: want weights that are packed for the chosen instruction set");
    return ops().forward[int(w.shape.format)];
}

}  // namespace

Forward::Forward(std::shared_ptr<const DecoderWeights> weights)
    : weights_(std::move(weights)), kernels_(kernels_for(*weights_)) {
    for (int64_t i = 0; i < weights_->shape.layers; ++i)
        if (!(weights_->layer(i).scale > 0.0f))
            throw std::invalid_argument("forward: a scale of scores is not positive");
}

Forward::~Forward() { delete spare_.load(); }

std::unique_ptr<Forward::Space> Forward::take(int64_t rows, int threads) const {
    std::unique_ptr<Space> space(spare_.exchange(nullptr));
    if (space && space->rows >= rows && space->threads >= threads) return space;
    space.reset();
    return std::make_unique<Space>(weights_->shape, kernels_, rows, threads);
}

void Forward::run(const ForwardParams& params, int threads) const {
    const DecoderShape& s = weights_->shape;
    if (params.length < 1 || params.length > s.positions || params.batch < 1 ||
        params.batch > kMostPositions / params.length)
        throw std::invalid_argument("forward: " + std::to_string(params.batch) + " sequences of " +
                                    std::to_string(params.length) + " positions");
    const int64_t* end = params.taken + params.takes;
    const bool ascending = std::adjacent_find(params.taken, end, std::greater_equal<>()) == end;
    if (params.layers < 0 || params.layers > s.layers || !ascending ||
        (params.takes > 0 && (*params.taken < 0 || end[-1] > params.layers)))
        throw std::invalid_argument("forward: " + std::to_string(params.layers) + " layers of " +
                                    std::to_string(s.layers) + ", or what is taken lies behind none of them");
    if (params.bands < 1 || params.length % params.bands != 0)
        throw std::invalid_argument("forward: " + std::to_string(params.bands) + " bands of " +
                                    std::to_string(params.length) + " positions");
    for (int64_t i = 0; i < params.batch * params.length; ++i)
        if (params.tokens[i] < 0 || params.tokens[i] >= s.vocab)
            throw std::out_of_range("forward: token " + std::to_string(params.tokens[i]) + " is not in 0.." +
                                    std::to_string(s.vocab - 1));
    const int64_t positions = padded(params.length, kRows);
    const int64_t together = std::min(params.batch, std::max<int64_t>(1, kMostRows / positions));
    const int wanted = usable_threads(threads);
    std::unique_ptr<Space> space = take(together * positions, wanted);
    std::vector<Barrier> barriers(size_t(wanted) + 1);
    in_region(wanted, [&](int index, int count) {
        ForwardWorker worker(*this, params, *space, barriers.data(), index, count);
        for (int64_t first = 0; first < params.batch; first += together)
            worker.run(first, std::min(together, params.batch - first));
    });
    delete spare_.exchange(space.release());
}

}  // namespace igpt::cpu
