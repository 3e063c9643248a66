// The CPU decoder and its weights for Python: raw addresses and sizes in. No maths, no torch.
// Whoever calls it has checked every argument (igpt_fast/engines/cpu).
#include "cpu/decoder.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "bind.h"
#include "cpu/checksums.h"
#include "cpu/drafts.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

namespace cpu = igpt::cpu;

// (address, is bf16, stride along inputs, stride along outputs)
using Address = std::tuple<uintptr_t, bool, int64_t, int64_t>;

cpu::Source source(const Address& a) {
    return {reinterpret_cast<const void*>(std::get<0>(a)), std::get<1>(a), std::get<2>(a), std::get<3>(a)};
}

template <class T>
std::vector<T> copied(uintptr_t address, int64_t count) {
    const T* from = reinterpret_cast<const T*>(address);
    return {from, from + count};
}

const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }

}  // namespace

void bind_decoder(py::module_& m) {
    const py::call_guard<py::gil_scoped_release> unlocked;
    m.def("checksums", &cpu::checksums, unlocked);
    py::class_<cpu::DecoderWeights, std::shared_ptr<cpu::DecoderWeights>>(m, "DecoderWeights")
        .def(py::init([](int64_t layers, int64_t embd, int64_t heads, int64_t inner, int64_t positions, int64_t vocab,
                         float eps, int32_t activation, int32_t format) {
                 return std::make_shared<cpu::DecoderWeights>(cpu::DecoderShape{
                     layers, embd, heads, inner, positions, vocab, eps, cpu::Then(activation), cpu::Format(format)});
             }),
             unlocked, py::kw_only(), "layers"_a, "embd"_a, "heads"_a, "inner"_a, "positions"_a, "vocab"_a, "eps"_a,
             "activation"_a, "format"_a)
        .def(
            "set_tables",
            [](cpu::DecoderWeights& self, uintptr_t wte, uintptr_t wpe, uintptr_t norm, const Address& head,
               int32_t threads) { self.set_tables(floats(wte), floats(wpe), floats(norm), source(head), threads); },
            unlocked, py::kw_only(), "wte"_a, "wpe"_a, "norm"_a, "head"_a, "threads"_a)
        .def(
            "set_layer",
            [](cpu::DecoderWeights& self, int64_t layer, uintptr_t ln_1, uintptr_t ln_2, const Address& qkv_weight,
               uintptr_t qkv_bias, const Address& out_weight, uintptr_t out_bias, const Address& fc_weight,
               uintptr_t fc_bias, const Address& proj_weight, uintptr_t proj_bias, float scale, int32_t threads) {
                self.set_layer(layer,
                               {floats(ln_1), floats(ln_2), source(qkv_weight), source(out_weight), source(fc_weight),
                                source(proj_weight), floats(qkv_bias), floats(out_bias), floats(fc_bias),
                                floats(proj_bias), scale},
                               threads);
            },
            unlocked, py::kw_only(), "layer"_a, "ln_1"_a, "ln_2"_a, "qkv_weight"_a, "qkv_bias"_a, "out_weight"_a,
            "out_bias"_a, "fc_weight"_a, "fc_bias"_a, "proj_weight"_a, "proj_bias"_a, "scale"_a, "threads"_a);
    py::class_<cpu::Decoder>(m, "Decoder")
        .def(py::init([](std::shared_ptr<cpu::DecoderWeights> weights, int64_t batch, int64_t capacity) {
                 return std::make_unique<cpu::Decoder>(std::move(weights), batch, capacity);
             }),
             unlocked)
        .def(
            "step",
            [](cpu::Decoder& self, uintptr_t tokens, uintptr_t logits, int32_t threads) {
                self.step(reinterpret_cast<const int64_t*>(tokens), reinterpret_cast<float*>(logits), threads);
            },
            unlocked)
        .def(
            "step_rows",
            [](cpu::Decoder& self, uintptr_t tokens, int64_t count, uintptr_t logits, int32_t threads) {
                self.step_rows(reinterpret_cast<const int64_t*>(tokens), count, reinterpret_cast<float*>(logits),
                               threads);
            },
            unlocked)
        .def(
            "load",
            [](cpu::Decoder& self, int64_t layer, uintptr_t keys, uintptr_t values, int64_t count, int32_t threads) {
                self.load(layer, floats(keys), floats(values), count, threads);
            },
            unlocked)
        .def("advance", &cpu::Decoder::advance)
        .def("fork", &cpu::Decoder::fork, unlocked)
        .def("rewind", &cpu::Decoder::rewind, unlocked)
        .def_property_readonly("rows_are_steps", &cpu::Decoder::rows_are_steps)
        .def_property_readonly("position", &cpu::Decoder::position)
        .def_property_readonly("sizes", &cpu::Decoder::sizes, "(batch, heads, head_dim, colours)")
        .def_property_readonly("bytes", &cpu::Decoder::bytes);
    // Under the interpreter's lock, which nothing else would guard them by: 16 rows of 512 colours are drawn within 60
    // microseconds, by top-p within 400.
    py::class_<cpu::Drafts>(m, "Drafts")
        .def(py::init([](uintptr_t pixels, int64_t count, uintptr_t uniform, uintptr_t known, int64_t length,
                         int64_t width, int64_t k, float temperature, int64_t top_k, double top_p, float min_score) {
                 cpu::SampleParams settings{};
                 settings.k = k, settings.temperature = temperature, settings.top_k = top_k;
                 settings.top_p = top_p, settings.min_score = min_score;
                 return std::make_unique<cpu::Drafts>(copied<int64_t>(pixels, count), copied<float>(uniform, length),
                                                      copied<int64_t>(known, known ? length : 0), width, settings);
             }),
             py::kw_only(), "pixels"_a, "count"_a, "uniform"_a, "known"_a, "length"_a, "width"_a, "k"_a,
             "temperature"_a, "top_k"_a, "top_p"_a, "min_score"_a)
        .def("learn",
             [](cpu::Drafts& self, uintptr_t logits, int64_t stride, int64_t rows, uintptr_t tokens,
                uintptr_t logprobs) {
                 return self.learn(floats(logits), stride, rows, reinterpret_cast<int64_t*>(tokens),
                                   reinterpret_cast<float*>(logprobs));
             })
        .def("following",
             [](cpu::Drafts& self, uintptr_t tokens) { return self.following(reinterpret_cast<int64_t*>(tokens)); });
    m.attr("most_draft_rows") = cpu::kMostRows;
}
