// Functions of Python that fill a Params struct by name and run what takes it: f(q=..., k=..., rows=...). Every field
// has to be there, and nothing else may be. Names cost no more than places do: the interpreter hands over a tuple of
// them that it has made once for each call in the source, and comparing pointers finds them, fastest in the order of
// `fields`.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string_view>
#include <type_traits>

namespace igpt::bind {

template <class P>
struct Field {
    std::string_view name;
    bool (*set)(P&, PyObject*);  // false with Python's error set
};

// What the compiler calls a member, without its class.
template <auto Member>
constexpr auto name_of() {
    constexpr std::string_view letters = "abcdefghijklmnopqrstuvwxyz_0123456789", all = __PRETTY_FUNCTION__;
    constexpr size_t last = all.find_last_of(letters), before = all.find_last_not_of(letters, last);
    static_assert(all[before + 1] >= 'a' && all[before] == ':', "this compiler writes members in another way");
    return all.substr(before + 1, last - before);
}

// An address, a number, a bool, an enumerator's number, or for a tensor of four dimensions (address, three strides).
template <class T>
bool read(PyObject* from, T& to) {
    if constexpr (std::is_class_v<T>) {
        auto& [address, first, second, third] = to;
        if (!PyTuple_Check(from) || PyTuple_GET_SIZE(from) != 4)
            return PyErr_SetString(PyExc_TypeError, "want (address, three strides)"), false;
        return read(PyTuple_GET_ITEM(from, 0), address) && read(PyTuple_GET_ITEM(from, 1), first) &&
               read(PyTuple_GET_ITEM(from, 2), second) && read(PyTuple_GET_ITEM(from, 3), third);
    } else if constexpr (std::is_pointer_v<T>) {
        const uint64_t address = PyLong_AsUnsignedLongLong(from);
        to = reinterpret_cast<T>(uintptr_t(address));
    } else if constexpr (std::is_floating_point_v<T>) {
        to = T(PyFloat_AsDouble(from));
    } else if constexpr (std::is_enum_v<T>) {
        std::underlying_type_t<T> number;
        if (!read(from, number)) return false;
        to = T(number);
    } else if constexpr (std::is_same_v<T, uint64_t>) {
        to = PyLong_AsUnsignedLongLong(from);
    } else {
        const int64_t number = PyLong_AsLongLong(from);
        to = T(number);
        if (number != int64_t(to)) PyErr_SetString(PyExc_OverflowError, "the number is too large");
    }
    return !PyErr_Occurred();
}

template <class P, auto... Path>
bool set(P& params, PyObject* value) {
    return read(value, (params.*....*Path));
}

template <class P, auto... Members>
bool set_all(P& params, PyObject* value) {
    if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != sizeof...(Members))
        return PyErr_Format(PyExc_TypeError, "want a tuple of %d", int(sizeof...(Members))), false;
    Py_ssize_t i = 0;
    return (read(PyTuple_GET_ITEM(value, i++), params.*Members) && ...);
}

// Members of P under their names; members of a member of it; several together, as a tuple.
template <class P, auto... Members>
constexpr std::array<Field<P>, sizeof...(Members)> members{{{name_of<Members>(), set<P, Members>}...}};
template <class P, auto Outer, auto... Members>
constexpr std::array<Field<P>, sizeof...(Members)> members_of{{{name_of<Members>(), set<P, Outer, Members>}...}};
template <class P, auto... Members>
constexpr std::array<Field<P>, 1> together(std::string_view name) {
    return {{{name, set_all<P, Members...>}}};
}

template <class P, size_t M, size_t N>
constexpr std::array<Field<P>, M + N> operator+(const std::array<Field<P>, M>& a, const std::array<Field<P>, N>& b) {
    std::array<Field<P>, M + N> both{};
    for (size_t i = 0; i < M + N; ++i) both[i] = i < M ? a[i] : b[i - M];
    return both;
}

// The error that is set, as a TypeError that begins with the op and the argument.
inline PyObject* refuse(PyObject* op, PyObject* name) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_Format(PyExc_TypeError, "%U: %U: %S", op, name, value ? value : Py_None);
    Py_XDECREF(type), Py_XDECREF(value), Py_XDECREF(trace);
    return nullptr;
}

// Runs F::run without the interpreter's lock; its exceptions become Python's.
template <class F>
PyObject* run(PyObject* op, const typename F::P& params) {
    const char* failure = nullptr;
    try {
        const pybind11::gil_scoped_release unlocked;
        failure = F::run(params);
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    } catch (const std::out_of_range& error) {
        return PyErr_SetString(PyExc_IndexError, error.what()), nullptr;
    } catch (const std::invalid_argument& error) {
        return PyErr_SetString(PyExc_ValueError, error.what()), nullptr;
    } catch (const std::exception& error) {
        return PyErr_SetString(PyExc_RuntimeError, error.what()), nullptr;
    }
    if (failure) return PyErr_Format(PyExc_RuntimeError, "%U: CUDA error: %s", op, failure);
    Py_RETURN_NONE;
}

template <class F>
PyObject* call(PyObject* op, PyObject* const* values, Py_ssize_t places, PyObject* names) {
    constexpr size_t count = F::fields.size();
    static_assert(count < 64);
    static const auto known = [] {
        std::array<PyObject*, count> all{};
        for (size_t i = 0; i < count; ++i) {
            all[i] = PyUnicode_FromStringAndSize(F::fields[i].name.data(), Py_ssize_t(F::fields[i].name.size()));
            PyUnicode_InternInPlace(&all[i]);
        }
        return all;
    }();
    if (places) return PyErr_Format(PyExc_TypeError, "%U: want the arguments by name", op);
    typename F::P params{};
    uint64_t missing = (uint64_t(1) << count) - 1;
    for (size_t i = 0, given = names ? size_t(PyTuple_GET_SIZE(names)) : 0; i < given; ++i) {
        PyObject* name = PyTuple_GET_ITEM(names, Py_ssize_t(i));
        size_t at = 0;
        while (at < count && known[at] != name) ++at;
        // A name that was put together while running is another object.
        if (at == count)
            for (at = 0; at < count && PyUnicode_Compare(known[at], name) != 0;) ++at;
        if (at == count) return PyErr_Format(PyExc_TypeError, "%U: there is no argument %R", op, name);
        if (!F::fields[at].set(params, values[i])) return refuse(op, name);
        missing &= ~(uint64_t(1) << at);
    }
    for (size_t i = 0; missing && i < count; ++i)
        if (missing >> i & 1) return PyErr_Format(PyExc_TypeError, "%U: the argument %R is missing", op, known[i]);
    return run<F>(op, params);
}

// F: the Params P, their `fields` that Python gives, and run(const P&), which gives CUDA's error, or null. The name:
// op_cpu or op_cuda.
template <class F>
void def(pybind11::module_& m, const char* name) {
    static PyMethodDef method{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call<F>)),
                              METH_FASTCALL | METH_KEYWORDS, nullptr};
    const std::string_view op = name;
    pybind11::str self(op.data(), op.rfind('_'));
    m.attr(name) = pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&method, self.release().ptr()));
}

template <class Result, class Params>
Params params_of(Result (*)(const Params&));
template <class Result, class Params>
Params params_of(Result (*)(Params));

// A driver of the CPU, as the base of an F.
template <auto Driver>
struct Cpu {
    using P = decltype(params_of(Driver));
    static const char* run(const P& params) { return Driver(params), nullptr; }
};

}  // namespace igpt::bind
