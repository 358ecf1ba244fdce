#include <cstdio>
#include <cstring>

#include "check.h"

// Runs every case, or those whose names contain the first argument. Fails when none was run.
int main(int argc, char** argv) {
  using namespace chunkft::test;
  int passed = 0, failed = 0;
  for (const Case& test : cases()) {
    if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
    const int before = failures();
    test.body();
    const bool ok = failures() == before;
    ok ? ++passed : ++failed;
    std::printf("%s %s\n", ok ? "ok  " : "FAIL", test.name);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}
