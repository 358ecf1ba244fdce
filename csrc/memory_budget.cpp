#include "memory_budget.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <utility>
#include <vector>

namespace chunkft {
namespace {

// Limits from here on mean none: cgroup v1 writes the largest multiple of a page.
constexpr std::uint64_t kNoLimit = std::uint64_t{1} << 62;

// A file that holds one number; nothing for "max", or if there is no such file.
std::optional<std::uint64_t> read_number(const std::string& path) {
  std::ifstream file(path);
  std::uint64_t number = 0;
  if (!(file >> number)) return std::nullopt;
  return number;
}

// The value behind `key` in lines of "key value" or "key: value kB".
std::optional<std::uint64_t> read_key(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string name;
    std::uint64_t value = 0;
    if (words >> name >> value && name == key) return value;
  }
  return std::nullopt;
}

struct Version {
  const char* file_system;  // in mountinfo
  const char* limit;
  const char* usage;
  const char* stat_prefix;  // of the counters that include children
};
constexpr Version kVersions[] = {
    {"cgroup2", "memory.max", "memory.current", ""},
    {"cgroup", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"},
};

// The path of this process in the hierarchy that controls memory: "0::/path" (v2), "4:cpu,memory:/path" (v1).
std::optional<std::string> group_path(const std::string& root, bool v2) {
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const std::size_t first = line.find(':');
    const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool wanted = v2 ? line.rfind("0::", 0) == 0 : controllers.find(",memory,") != std::string::npos;
    if (wanted) return line.substr(second + 1);
  }
  return std::nullopt;
}

struct Mount {
  std::string root;  // the group that the mount shows as its top
  std::string point;
};

// Where the hierarchy is mounted. In mountinfo: id parent device root point options [tags] - type source super-options.
std::optional<Mount> find_mount(const std::string& root, const Version& version, bool v2) {
  std::ifstream file(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    std::istringstream head(line.substr(0, dash)), tail(line.substr(dash + 3));
    std::string id, parent, device, type, source, options;
    Mount mount;
    if (!(head >> id >> parent >> device >> mount.root >> mount.point)) continue;
    if (!(tail >> type >> source >> options) || type != version.file_system) continue;
    if (v2 || ("," + options + ",").find(",memory,") != std::string::npos) return mount;
  }
  return std::nullopt;
}

void consider(std::vector<MemoryBudget>& found, std::uint64_t limit, std::uint64_t used, const std::string& source) {
  found.push_back({limit, limit - std::min(limit, used), source});
}

// The process's group and all above it: each may have a limit.
void groups(std::vector<MemoryBudget>& found, const std::string& root, const Version& version, bool v2) {
  const auto path = group_path(root, v2);
  const auto mount = find_mount(root, version, v2);
  if (!path || !mount) return;
  // A container may see a path from outside of its mount: what it sees at the mount's top then is its own group.
  const std::string top = mount->root == "/" ? "" : mount->root;
  std::string below = path->rfind(top + "/", 0) == 0 ? path->substr(top.size()) : "";
  while (!below.empty() && below.back() == '/') below.pop_back();
  for (;;) {
    const std::string directory = mount->point + below + "/";
    const auto limit = read_number(root + directory + version.limit);
    if (limit && *limit < kNoLimit) {
      const std::string stat = root + directory + "memory.stat";
      std::uint64_t cache = 0;
      for (const char* kind : {"inactive_file", "active_file"}) {
        cache += read_key(stat, std::string(version.stat_prefix) + kind).value_or(0);
      }
      const std::uint64_t usage = read_number(root + directory + version.usage).value_or(0);
      consider(found, *limit, usage - std::min(usage, cache), directory + version.limit);
    }
    if (below.empty()) return;
    below.resize(below.rfind('/'));
  }
}

// "137438953472" or "128GiB"; nothing for what is neither.
std::optional<std::uint64_t> parse_bytes(const std::string& text) {
  std::uint64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc()) return std::nullopt;
  const std::string unit(end, text.data() + text.size());
  int shift = -1;
  for (const auto& [name, bits] : {std::pair{"", 0}, {"KiB", 10}, {"MiB", 20}, {"GiB", 30}, {"TiB", 40}}) {
    if (unit == name) shift = bits;
  }
  if (shift < 0 || number > (kNoLimit >> shift)) return std::nullopt;
  return number << shift;
}

// What the user states in the place of what the system says, less what this process holds.
MemoryBudget stated_budget(const std::string& text, const std::string& root) {
  const std::string source = std::string(kHostMemory) + "=" + text;
  const auto limit = parse_bytes(text);
  if (!limit) return {0, 0, source + ", which is no number of bytes such as 128GiB"};
  const std::uint64_t held = read_key(root + "/proc/self/status", "VmRSS:").value_or(0) * 1024;
  return {*limit, *limit - std::min(*limit, held), source};
}

}  // namespace

std::optional<MemoryBudget> memory_budget(const std::string& root) {
  if (const char* stated = std::getenv(kHostMemory)) return stated_budget(stated, root);
  std::vector<MemoryBudget> found;
  const std::string machine = "/proc/meminfo";
  const auto total = read_key(root + machine, "MemTotal:");
  const auto available = read_key(root + machine, "MemAvailable:");
  if (total && available) consider(found, *total * 1024, (*total - std::min(*total, *available)) * 1024, machine);
  for (const Version& version : kVersions) groups(found, root, version, &version == kVersions);
  const auto narrowest = std::min_element(found.begin(), found.end(), [](const auto& a, const auto& b) {
    return a.available < b.available;
  });
  return narrowest == found.end() ? std::nullopt : std::optional(*narrowest);
}

}  // namespace chunkft
