// The current device, asked once.
#include <mutex>
#include <vector>

#include "launch.h"

namespace lookagain {
namespace cuda {

const Device& current_device() {
  static std::mutex mutex;
  static std::vector<Device*> known;  // by index; kept for the life of the process
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() <= static_cast<size_t>(index)) known.resize(index + 1, nullptr);
  if (known[index] != nullptr) return *known[index];
  auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
    return value;
  };
  Device* device = new Device;
  device->major = attribute(cudaDevAttrComputeCapabilityMajor);
  device->minor = attribute(cudaDevAttrComputeCapabilityMinor);
  device->multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  device->shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device->shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  if (device->major < 8) {
    const std::string has = "sm_" + std::to_string(device->major) + std::to_string(device->minor);
    delete device;
    throw std::runtime_error("lookagain_ext: this GPU is " + has +
                             ", the kernels were compiled for " LOOKAGAIN_CUDA_ARCHS
                             " and need sm_80 or newer");
  }
  known[index] = device;
  return *device;
}

DeviceGuard::DeviceGuard(int index) : before_(-1) {
  int current = 0;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current == index) return;
  check(cudaSetDevice(index), "cudaSetDevice");
  before_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);
}

}  // namespace cuda
}  // namespace lookagain
