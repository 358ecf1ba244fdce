#pragma once

#include <cstdint>

// The DLPack ABI, as far as one-dimensional byte tensors in host memory need it. Declared here, so that the build needs
// neither a DLPack package nor a tensor library. Layout: https://dmlc.github.io/dlpack/latest/c_api.html
namespace chunkft::dlpack {

constexpr std::int32_t kCpu = 1;
constexpr std::uint8_t kUnsignedInteger = 1;

struct Device {
  std::int32_t type;
  std::int32_t id;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct ManagedTensor {
  static constexpr const char* kCapsule = "dltensor";

  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

struct ManagedTensorVersioned {
  static constexpr const char* kCapsule = "dltensor_versioned";

  std::uint32_t major;
  std::uint32_t minor;
  void* context;
  void (*deleter)(ManagedTensorVersioned*);
  std::uint64_t flags;
  Tensor tensor;
};

}  // namespace chunkft::dlpack
