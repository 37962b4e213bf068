#include "bindings/tensor.h"

#include "bindings/bindings.h"

namespace py = pybind11;

namespace pdiff::bindings {
namespace {

// DLPack 1.x, as its specification lays these out.
struct DlTensor {
  void* data;
  int32_t device_type, device_idx;
  int32_t num_dims;
  uint8_t type, bits;
  uint16_t num_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DlExchange {
  uint32_t major, minor;
  void* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, DlTensor* tensor);  // may be null
  void* current_stream;
};

struct TensorType {
  PyTypeObject* type = nullptr;
  const DlExchange* exchange = nullptr;
};
TensorType tensor_type;

void use_tensor_type(const py::type& type) {
  constexpr const char* kName = "__dlpack_c_exchange_api__";
  if (!py::hasattr(type, kName)) {
    throw py::import_error("torch: expected 2.11 or newer, whose tensors have " +
                           std::string(kName));
  }
  const py::capsule capsule = type.attr(kName);
  const auto* exchange =
      static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (exchange == nullptr) throw py::error_already_set();
  if (exchange->major != 1 || exchange->tensor_from_object == nullptr) {
    throw py::import_error("torch: expected DLPack 1.x in its tensors, got " +
                           std::to_string(exchange->major));
  }
  tensor_type = {reinterpret_cast<PyTypeObject*>(py::type(type).release().ptr()), exchange};
}

std::string name_of(TypeCode type, int bits) {
  switch (type) {
    case TypeCode::kInt:
      return "int" + std::to_string(bits);
    case TypeCode::kUInt:
      return "uint" + std::to_string(bits);
    case TypeCode::kFloat:
      return "float" + std::to_string(bits);
    case TypeCode::kBFloat:
      return "bfloat" + std::to_string(bits);
    case TypeCode::kBool:
      return "bool";
  }
  return "another type";
}

bool is_tensor(py::handle object) {
  return tensor_type.type != nullptr && PyObject_TypeCheck(object.ptr(), tensor_type.type) != 0;
}

// Whether `wanted` has the size at its place, or says that any will do.
bool is_size(py::handle wanted, int64_t size) {
  return !PyLong_Check(wanted.ptr()) || PyLong_AsLongLong(wanted.ptr()) == size;
}

bool fits(py::handle object, py::handle dtypes, const py::tuple& shape, const Tensor& like,
          bool contiguous) {
  if (!is_tensor(object)) return false;
  const Tensor tensor = tensor_of(object);
  const py::object dtype = object.attr("dtype");
  const bool is_type = PyTuple_Check(dtypes.ptr())
                           ? PySequence_Contains(dtypes.ptr(), dtype.ptr()) == 1
                           : dtype.is(dtypes);
  if (!is_type || !tensor.has_memory || tensor.num_dims != static_cast<int>(shape.size()) ||
      tensor.device_type != like.device_type || tensor.device_idx != like.device_idx) {
    return false;
  }
  for (int i = 0; i < tensor.num_dims; ++i) {
    if (!is_size(shape[i], tensor.shape[i])) return false;
  }
  return !contiguous || tensor.is_contiguous();
}

}  // namespace

Tensor tensor_of(py::handle object) {
  if (object.is_none()) return {};
  if (!is_tensor(object)) {
    throw py::type_error("expected a tensor, got " + std::string(Py_TYPE(object.ptr())->tp_name));
  }
  constexpr Tensor kWithoutMemory{.is_none = false, .has_memory = false};
  DlTensor found{};
  if (tensor_type.exchange->tensor_from_object(object.ptr(), &found) != 0) {
    PyErr_Clear();
    return kWithoutMemory;
  }
  auto* const memory = static_cast<unsigned char*>(found.data);
  const Tensor tensor{.data = memory == nullptr ? nullptr : memory + found.byte_offset,
                      .num_dims = found.num_dims,
                      .shape = found.shape,
                      .strides = found.strides,
                      .type = static_cast<TypeCode>(found.type),
                      .bits = found.bits,
                      .device_type = found.device_type,
                      .device_idx = found.device_idx,
                      .is_none = false};
  return memory == nullptr && tensor.num_elements() > 0 ? kWithoutMemory : tensor;
}

int64_t Tensor::num_elements() const {
  int64_t num = 1;
  for (int i = 0; i < num_dims; ++i) num *= shape[i];
  return num;
}

bool Tensor::is_contiguous() const {
  int64_t stride = 1;
  for (int i = num_dims - 1; i >= 0; --i) {
    if (shape[i] != 1 && strides[i] != stride) return num_elements() == 0;
    stride *= shape[i];
  }
  return true;
}

std::string Tensor::shape_text() const {
  std::string text = "[";
  for (int i = 0; i < num_dims; ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::string Tensor::type_text() const { return name_of(type, bits); }

DType Tensor::dtype(const char* name) const {
  check_memory(name);
  if (type == TypeCode::kFloat && bits == 32) return DType::kFloat32;
  if (type == TypeCode::kBFloat && bits == 16) return DType::kBFloat16;
  if (type == TypeCode::kFloat && bits == 16) return DType::kFloat16;
  detail::throw_error(name, ": expected float32, bfloat16 or float16, got ", type_text());
}

void Tensor::check_memory(const char* name) const {
  PDIFF_CHECK(has_memory, name, ": expected a tensor with memory of its own, got one without");
}

void Tensor::check_type(const char* name, TypeCode wanted, int wanted_bits) const {
  if (is_none) return;
  check_memory(name);
  const bool is_byte = wanted == TypeCode::kUInt && wanted_bits == 8;  // a bool is one, too
  PDIFF_CHECK(bits == wanted_bits && (type == wanted || (is_byte && type == TypeCode::kBool)), name,
              ": expected ", name_of(wanted, wanted_bits), ", got ", type_text());
}

void bind_tensor(py::module_& m) {
  m.def("use_tensor_type", &use_tensor_type);
  m.def("fits", &fits);
}

}  // namespace pdiff::bindings
