#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "status.h"

namespace chunkft {

namespace py = pybind11;

void bind_adamw(py::module_& m);
void bind_pager(py::module_& m);
void bind_cuda(py::module_& m);  // after HostArena, to which it adds

[[noreturn]] inline void raise(const Error& error) {
  switch (error.code) {
    case Code::kInvalidArgument:
      throw py::value_error(error.message());
    case Code::kClosed:
    case Code::kDriver:
    case Code::kPoisoned:
    case Code::kBusy:
    case Code::kForked:
    case Code::kCorrupt:
      PyErr_SetString(PyExc_RuntimeError, error.message().c_str());
      throw py::error_already_set();
    case Code::kSystem:
    case Code::kIo:
      // OSError(errno, text) makes Python fill in .errno.
      PyErr_SetObject(PyExc_OSError, py::make_tuple(error.sys_errno, error.message()).ptr());
      throw py::error_already_set();
  }
  throw py::value_error(error.message());
}

template <typename T>
T value_or_raise(Result<T> result) {
  if (!result.ok()) raise(result.error());
  return std::move(result.value());
}

// A size from anything with __index__; pybind11's own conversion would not name the argument in its error.
inline std::size_t to_size(const py::handle& value, const char* op, const char* name) {
  auto bad = [&](const std::string& got) {
    return invalid_argument(op, std::string(name) + " must be an integer from 0 to 2**63 - 1, got " + got);
  };
  py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) {
    PyErr_Clear();
    PyErr_SetString(PyExc_TypeError, bad(py::repr(value).cast<std::string>()).message().c_str());
    throw py::error_already_set();
  }
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0 || number < 0) raise(bad(py::str(index).cast<std::string>()));
  return static_cast<std::size_t>(number);
}

}  // namespace chunkft
