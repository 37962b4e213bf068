#pragma once

// Tensors as arguments. What a binding wants to know of one comes from the table of C functions
// that torch's tensor type offers (DLPack's exchange API): it takes 40 ns, a tenth of asking
// Python.

#include <pybind11/pybind11.h>

#include <concepts>
#include <cstdint>
#include <string>
#include <type_traits>

#include "pdiff/dtype.h"
#include "pdiff/error.h"

namespace pdiff::bindings {

/// DLPack's numbers of element types.
enum class TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kBool = 6 };

/// A tensor, or None. It lies in memory as its shape and strides say; these belong to the Python
/// object.
struct Tensor {
  void* data = nullptr;  // also of an empty tensor
  int num_dims = 0;
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;  // in elements
  TypeCode type{};
  int bits = 0;
  int device_type = 0, device_idx = 0;  // as DLPack counts them
  bool is_none = true;
  bool has_memory = true;  // not a meta or sparse tensor, one under vmap, one whose memory is freed

  bool is_on_cpu() const { return device_type == 1; }
  bool is_contiguous() const;
  int64_t num_elements() const;
  std::string shape_text() const;  // "[2, 3]"
  std::string type_text() const;   // "float32"

  /// The element type of what a kernel takes in several; `name` is the argument's.
  DType dtype(const char* name) const;

  /// The elements, of one type; null for None.
  template <typename T>
  T* as(const char* name) const {
    check_type(name, code_of<std::remove_const_t<T>>(), 8 * sizeof(T));
    return static_cast<T*>(data);
  }

  /// The same where there have to be `num` of them.
  template <typename T>
  T* as(const char* name, int64_t num) const {
    PDIFF_CHECK(is_none || num_elements() == num, name, ": expected ", num, " elements, got ",
                shape_text());
    return as<T>(name);
  }

 private:
  void check_memory(const char* name) const;
  void check_type(const char* name, TypeCode wanted, int wanted_bits) const;

  template <typename T>
  static constexpr TypeCode code_of() {
    if (std::floating_point<T>) return TypeCode::kFloat;
    return std::signed_integral<T> ? TypeCode::kInt : TypeCode::kUInt;
  }
};

/// What the table says of `object`; TypeError if it is neither a tensor nor None.
Tensor tensor_of(pybind11::handle object);

}  // namespace pdiff::bindings

namespace pybind11::detail {

template <>
struct type_caster<pdiff::bindings::Tensor> {
  PYBIND11_TYPE_CASTER(pdiff::bindings::Tensor, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    value = pdiff::bindings::tensor_of(source);
    return true;
  }
};

}  // namespace pybind11::detail
