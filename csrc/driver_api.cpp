#include "driver_api.h"

#include <cstdlib>
#include <dlfcn.h>
#include <map>
#include <memory>
#include <mutex>

namespace chunkft {
namespace {

constexpr CuResult kCudaErrorNoDevice = 100;

Error missing(const std::string& library, const std::string& what) {
  return {Code::kDriver, "loading the CUDA driver", "library \"" + library + "\": " + what};
}

}  // namespace

std::string DriverApi::default_library() {
  const char* chosen = std::getenv("CHUNKFT_LIBCUDA");
  return chosen != nullptr && *chosen != '\0' ? chosen : "libcuda.so.1";
}

Result<DriverApi> DriverApi::load(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* reason = dlerror();
    return missing(library, std::string(reason != nullptr ? reason : "dlopen failed") +
                                "; it comes with the NVIDIA driver, and CHUNKFT_LIBCUDA may name another one");
  }
  DriverApi api;
  api.library_ = library;
#define CHUNKFT_LOOK_UP(symbol, parameters)                                                      \
  api.symbol = reinterpret_cast<CuResult(*) parameters>(dlsym(handle, #symbol));                 \
  if (api.symbol == nullptr) {                                                                   \
    dlclose(handle);                                                                             \
    return missing(library, "it has no function " #symbol ", which every driver since CUDA 11 has"); \
  }
  CHUNKFT_CUDA_FUNCTIONS(CHUNKFT_LOOK_UP)
#undef CHUNKFT_LOOK_UP
  return api;
}

Result<const DriverApi*> DriverApi::shared() {
  // Never destroyed: backends held by Python may outlive static destructors at exit.
  static auto* mutex = new std::mutex;
  static auto* loaded = new std::map<std::string, std::unique_ptr<const DriverApi>>;
  const std::string library = default_library();
  std::lock_guard lock(*mutex);
  auto& entry = (*loaded)[library];
  if (entry == nullptr) {
    auto api = load(library);
    if (!api.ok()) return api.error();
    if (CuResult result = api.value().cuInit(0)) return api.value().error(result, "cuInit");
    entry = std::make_unique<const DriverApi>(std::move(api.value()));
  }
  return entry.get();
}

Error DriverApi::error(CuResult result, const char* function, std::size_t bytes) const {
  const char* name = nullptr;
  const char* text = nullptr;
  if (cuGetErrorName(result, &name) != kCudaSuccess) name = nullptr;
  if (cuGetErrorString(result, &text) != kCudaSuccess) text = nullptr;
  Error error = driver_error(function, bytes, result, name != nullptr ? name : "an error that the driver does not name");
  if (text != nullptr) error.detail = text;
  return error;
}

Status DriverApi::check(CuResult result, const char* function, std::size_t bytes) const {
  if (result == kCudaSuccess) return {};
  return error(result, function, bytes);
}

Result<CudaFacts> cuda_facts() {
  auto loaded = DriverApi::load(DriverApi::default_library());
  if (!loaded.ok()) return loaded.error();
  const DriverApi& api = loaded.value();
  CudaFacts facts{api.library(), 0, {}};
  if (CuResult result = api.cuDriverGetVersion(&facts.driver_version)) return api.error(result, "cuDriverGetVersion");
  CuResult result = api.cuInit(0);
  if (result == kCudaErrorNoDevice) return facts;
  if (result != kCudaSuccess) return api.error(result, "cuInit");
  int count = 0;
  if (CuResult code = api.cuDeviceGetCount(&count)) return api.error(code, "cuDeviceGetCount");
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    CuDevice device = 0;
    CudaDevice found;
    char name[256] = {};
    if (CuResult code = api.cuDeviceGet(&device, ordinal)) return api.error(code, "cuDeviceGet");
    if (CuResult code = api.cuDeviceGetName(name, sizeof name, device)) return api.error(code, "cuDeviceGetName");
    if (CuResult code = api.cuDeviceTotalMem_v2(&found.total_bytes, device)) {
      return api.error(code, "cuDeviceTotalMem_v2");
    }
    for (auto [attribute, value] : {std::pair{kCuAttributeComputeMajor, &found.compute_major},
                                    std::pair{kCuAttributeComputeMinor, &found.compute_minor}}) {
      if (CuResult code = api.cuDeviceGetAttribute(value, attribute, device)) {
        return api.error(code, "cuDeviceGetAttribute");
      }
    }
    found.name = name;
    facts.devices.push_back(std::move(found));
  }
  return facts;
}

}  // namespace chunkft
