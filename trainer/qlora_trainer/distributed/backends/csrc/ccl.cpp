// oneCCL as a transport.
#include <array>
#include <csignal>
#include <cstring>

#include <torch/csrc/distributed/c10d/Store.hpp>
#include <torch/extension.h>
#include <pybind11/chrono.h>

#include <oneapi/ccl.hpp>

#include "backend.hpp"

// oneCCL's archive was made by Intel's compiler, which calls these two by names of its own.
extern "C" void* _intel_fast_memcpy(void* to, const void* from, std::size_t bytes) {
  return std::memcpy(to, from, bytes);
}
extern "C" void* _intel_fast_memset(void* to, int value, std::size_t bytes) {
  return std::memset(to, value, bytes);
}

namespace qlora {

ccl::datatype ccl_type(c10::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return ccl::datatype::float32;
    case at::kBFloat16:
      return ccl::datatype::bfloat16;
    case at::kHalf:
      return ccl::datatype::float16;
    case at::kDouble:
      return ccl::datatype::float64;
    case at::kLong:
      return ccl::datatype::int64;
    case at::kInt:
      return ccl::datatype::int32;
    case at::kByte:
      return ccl::datatype::uint8;
    case at::kChar:
      return ccl::datatype::int8;
    default:
      TORCH_CHECK(false, "all-reduce: ccl cannot reduce ", type);
  }
}

ccl::reduction ccl_reduction(Reduction reduction) {
  switch (reduction) {
    case Reduction::sum:
      return ccl::reduction::sum;
    case Reduction::product:
      return ccl::reduction::prod;
    case Reduction::min:
      return ccl::reduction::min;
    default:
      return ccl::reduction::max;
  }
}

// Without worker threads oneCCL's progress is made by whoever asks for it, and by one thread at a time.
std::mutex& library() {
  static std::mutex mutex;
  return mutex;
}

template <typename Start>
void complete(Start start) {
  std::unique_lock<std::mutex> lock(library());
  ccl::event event = start();
  while (!event.test()) {
    lock.unlock();  // for the other groups of this process
    std::this_thread::yield();
    lock.lock();
  }
}

// libfabric's shared memory takes these signals to remove its files, which ranks that have yet to talk to each other
// still need: a job that is asked to stop goes on for a while. Restored here; see shared_memory.py for the files.
class Signals {
 public:
  Signals() {
    for (std::size_t i = 0; i < kinds.size(); ++i) {
      sigaction(kinds[i], nullptr, &before_[i]);
    }
  }

  ~Signals() {
    for (std::size_t i = 0; i < kinds.size(); ++i) {
      sigaction(kinds[i], &before_[i], nullptr);
    }
  }

 private:
  static constexpr std::array kinds{SIGBUS, SIGINT, SIGSEGV, SIGTERM};
  std::array<struct sigaction, kinds.size()> before_{};
};

class CclTransport : public Transport {
 public:
  CclTransport(int size, int rank, std::shared_ptr<ccl::kvs> kvs)
      : kvs_(std::move(kvs)), communicator_(connect(size, rank, kvs_)), size_(size) {}

  void all_reduce(void* data, std::size_t count, c10::ScalarType type, Reduction reduction) override {
    const auto element = ccl_type(type);
    complete([&] {
      return ccl::allreduce(data, data, count, element, ccl_reduction(reduction), communicator_);
    });
  }

  void broadcast(void* data, std::size_t bytes, int root) override {
    complete([&] { return ccl::broadcast(data, bytes, ccl::datatype::uint8, root, communicator_); });
  }

  void all_gather(const void* own, void* all, std::size_t bytes) override {
    const std::vector<std::size_t> counts(size_, bytes);
    complete([&] { return ccl::allgatherv(own, bytes, all, counts, ccl::datatype::uint8, communicator_); });
  }

  void barrier() override {
    complete([&] { return ccl::barrier(communicator_); });
  }

 private:
  static ccl::communicator connect(int size, int rank, const std::shared_ptr<ccl::kvs>& kvs) {
    const std::lock_guard<std::mutex> lock(library());
    return ccl::create_communicator(size, rank, kvs);
  }

  std::shared_ptr<ccl::kvs> kvs_;
  ccl::communicator communicator_;
  int size_;
};

// The address of rank 0's key-value server, through the group's store.
std::shared_ptr<ccl::kvs> meet(c10d::Store& store, int rank) {
  const std::string key = "ccl/kvs";
  if (rank == 0) {
    auto kvs = ccl::create_main_kvs();
    const auto address = kvs->get_address();
    store.set(key, std::vector<uint8_t>(address.begin(), address.end()));
    return kvs;
  }
  const auto bytes = store.get(key);
  ccl::kvs::address_type address;
  TORCH_CHECK(bytes.size() == address.size(), "rank 0 uses another oneCCL: its address has ", bytes.size(),
              " bytes, not ", address.size());
  std::copy(bytes.begin(), bytes.end(), address.begin());
  return ccl::create_kvs(address);
}

c10::intrusive_ptr<c10d::Backend> create(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                                         std::chrono::milliseconds timeout) {
  auto connect = [store, rank, size]() -> std::unique_ptr<Transport> {
    const Signals kept;
    ccl::init();
    return std::make_unique<CclTransport>(size, rank, meet(*store, rank));
  };
  return c10::make_intrusive<TransportBackend>("ccl", rank, size, timeout, connect);
}

std::string version() {
  return ccl::get_library_version().full;
}

}  // namespace qlora

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("create", &qlora::create, pybind11::arg("store"), pybind11::arg("rank"), pybind11::arg("size"),
             pybind11::arg("timeout"), pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("version", &qlora::version);
}
