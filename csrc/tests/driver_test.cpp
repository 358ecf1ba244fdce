#include "driver_api.h"

#include <cstdlib>
#include <set>
#include <string>
#include <thread>

#include "fake.h"

#ifdef CHUNKFT_HAVE_CUDA_H
#include "driver_prototypes.h"
#endif

namespace {

using chunkft::Code;
using chunkft::cuda_facts;
using chunkft::DriverApi;
using namespace chunkft::test;

TEST(a_missing_driver_is_an_error_that_names_the_library_and_the_variable) {
  auto api = DriverApi::load("libnosuchdriver.so.7");
  REQUIRE(!api.ok());
  CHECK(api.error().code == Code::kDriver);
  const std::string text = api.error().message();
  CHECK(text.find("libnosuchdriver.so.7") != std::string::npos);
  CHECK(text.find("CHUNKFT_LIBCUDA") != std::string::npos);
  CHECK(text.find("error 0") == std::string::npos);
}

TEST(a_library_without_a_function_is_an_error_that_names_both) {
  auto api = DriverApi::load("libm.so.6");
  REQUIRE(!api.ok());
  CHECK(api.error().code == Code::kDriver);
  CHECK(api.error().message().find("cuInit") != std::string::npos);
  CHECK(api.error().message().find("libm.so.6") != std::string::npos);
}

TEST(the_environment_names_the_library) {
  setenv("CHUNKFT_LIBCUDA", "libnosuchdriver.so.8", 1);
  CHECK(DriverApi::default_library() == "libnosuchdriver.so.8");
  auto shared = DriverApi::shared();
  REQUIRE(!shared.ok());
  CHECK(shared.error().message().find("libnosuchdriver.so.8") != std::string::npos);
  setenv("CHUNKFT_LIBCUDA", "", 1);
  CHECK(DriverApi::default_library() == "libcuda.so.1");
  unsetenv("CHUNKFT_LIBCUDA");
  CHECK(DriverApi::default_library() == "libcuda.so.1");
}

TEST(the_driver_is_initialised_once_and_a_failure_is_not_remembered) {
  start_fake();
  // A library of another name is another entry: the failure below must not meet one that is loaded already.
  const std::string other = "./" + std::string(CHUNKFT_FAKECUDA);
  setenv("CHUNKFT_LIBCUDA", CHUNKFT_FAKECUDA[0] == '/' ? ("//" + std::string(CHUNKFT_FAKECUDA)).c_str() : other.c_str(), 1);
  fakecuda_fail("cuInit", 1, 100, 0);
  auto failed = DriverApi::shared();
  REQUIRE(!failed.ok());
  CHECK(failed.error().driver_code == 100);
  CHECK(failed.error().message() ==
        "cuInit failed: CUDA_ERROR_NO_DEVICE (CUDA driver error 100): no CUDA-capable device is detected");
  auto first = DriverApi::shared();
  auto second = DriverApi::shared();
  REQUIRE(first.ok() && second.ok());
  CHECK(first.value() == second.value());
  CHECK(fakecuda_calls("cuInit") == 2);
  CHECK(clean());
}

TEST(errors_carry_the_drivers_own_name_text_and_size) {
  start_fake();
  auto shared = DriverApi::shared();
  REQUIRE(shared.ok());
  const DriverApi& api = *shared.value();
  CHECK(api.check(0, "cuInit").ok());
  CHECK(api.error(2, "cuMemHostRegister_v2", 4096).message() ==
        "cuMemHostRegister_v2 of 4096 bytes failed: CUDA_ERROR_OUT_OF_MEMORY (CUDA driver error 2): out of memory");
  const auto unnamed = api.error(12345, "cuEventRecord");
  CHECK(unnamed.driver_code == 12345);
  CHECK(unnamed.message().find("(CUDA driver error 12345)") != std::string::npos);
  CHECK(!unnamed.driver_name.empty());
}

TEST(facts_list_every_device) {
  start_fake();
  fakecuda_set_devices(3);
  auto facts = cuda_facts();
  REQUIRE(facts.ok());
  CHECK(facts.value().library == CHUNKFT_FAKECUDA);
  CHECK(facts.value().driver_version == 13000);
  REQUIRE(facts.value().devices.size() == 3);
  CHECK(facts.value().devices[2].name == "Fake device 2");
  CHECK(facts.value().devices[2].total_bytes == std::size_t{1} << 30);
  CHECK(facts.value().devices[2].compute_major == 9);
}

TEST(a_driver_without_a_device_still_has_a_version) {
  start_fake();
  fakecuda_fail("cuInit", 1, 100, 0);
  auto facts = cuda_facts();
  REQUIRE(facts.ok());
  CHECK(facts.value().driver_version == 13000);
  CHECK(facts.value().devices.empty());
}

TEST(each_failing_call_of_the_facts_is_named) {
  std::set<std::string> failed;
  for (std::uint64_t nth = 1;; ++nth) {
    start_fake();
    fakecuda_set_devices(2);
    fakecuda_fail(nullptr, nth, kUnknownError, 0);
    auto facts = cuda_facts();
    if (!fakecuda_failed()) {
      CHECK(facts.ok());
      break;
    }
    REQUIRE(!facts.ok());
    CHECK(facts.error().driver_code == kUnknownError);
    failed.insert(facts.error().op);
  }
  CHECK(failed.size() == 7);  // version, init, count; get, name, memory, attribute
}

}  // namespace
