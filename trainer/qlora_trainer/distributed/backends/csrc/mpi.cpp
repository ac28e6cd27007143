// MPI as a transport.
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/extension.h>
#include <pybind11/chrono.h>

#include <mpi.h>

#include "backend.hpp"

namespace qlora {

void check(int code, const char* what) {
  if (code != MPI_SUCCESS) {
    char text[MPI_MAX_ERROR_STRING];
    int length = 0;
    MPI_Error_string(code, text, &length);
    TORCH_CHECK(false, what, ": ", std::string(text, length));
  }
}

// MPI has no 16-bit floats of its own: pairs of bytes, and a reduction that knows what they are.
template <typename T, typename F>
void combine(void* in, void* inout, int* length, F combined) {
  const T* a = static_cast<const T*>(in);
  T* b = static_cast<T*>(inout);
  for (int i = 0; i < *length; ++i) {
    b[i] = combined(static_cast<float>(a[i]), static_cast<float>(b[i]));
  }
}

template <typename T>
struct Half {
  static void sum(void* in, void* inout, int* length, MPI_Datatype*) {
    combine<T>(in, inout, length, [](float a, float b) { return a + b; });
  }
  static void product(void* in, void* inout, int* length, MPI_Datatype*) {
    combine<T>(in, inout, length, [](float a, float b) { return a * b; });
  }
  static void min(void* in, void* inout, int* length, MPI_Datatype*) {
    combine<T>(in, inout, length, [](float a, float b) { return a < b || a != a ? a : b; });
  }
  static void max(void* in, void* inout, int* length, MPI_Datatype*) {
    combine<T>(in, inout, length, [](float a, float b) { return a > b || a != a ? a : b; });
  }

  MPI_Op ops[4];  // in the order of Reduction

  Half() {
    MPI_User_function* functions[] = {sum, product, min, max};
    for (int i = 0; i < 4; ++i) {
      check(MPI_Op_create(functions[i], 1, &ops[i]), "MPI_Op_create");
    }
  }
};

MPI_Datatype two_bytes() {
  MPI_Datatype type;
  check(MPI_Type_contiguous(2, MPI_BYTE, &type), "MPI_Type_contiguous");
  check(MPI_Type_commit(&type), "MPI_Type_commit");
  return type;
}

// A type that MPI can reduce, and how.
struct Reducible {
  MPI_Datatype type;
  MPI_Op op;
};

Reducible reducible(c10::ScalarType type, Reduction reduction) {
  static const MPI_Datatype pair = two_bytes();
  static const Half<c10::BFloat16> bfloat16;
  static const Half<c10::Half> half;
  const MPI_Op ops[] = {MPI_SUM, MPI_PROD, MPI_MIN, MPI_MAX};
  const int how = static_cast<int>(reduction);
  switch (type) {
    case at::kFloat:
      return {MPI_FLOAT, ops[how]};
    case at::kDouble:
      return {MPI_DOUBLE, ops[how]};
    case at::kLong:
      return {MPI_INT64_T, ops[how]};
    case at::kInt:
      return {MPI_INT32_T, ops[how]};
    case at::kByte:
      return {MPI_UINT8_T, ops[how]};
    case at::kChar:
      return {MPI_INT8_T, ops[how]};
    case at::kBFloat16:
      return {pair, bfloat16.ops[how]};
    case at::kHalf:
      return {pair, half.ops[how]};
    default:
      TORCH_CHECK(false, "all-reduce: mpi cannot reduce ", type);
  }
}

// MPI as this process has joined it, once. A session, and not MPI_Init: what fails there is returned; MPI_Init would
// end the process, with a code of its own or a fault.
struct World {
  MPI_Session session = MPI_SESSION_NULL;
  MPI_Group group = MPI_GROUP_NULL;

  // Joins those that PMI_FD, PMI_RANK and PMI_SIZE describe.
  World() {
    MPI_Info info;
    check(MPI_Info_create(&info), "MPI_Info_create");
    check(MPI_Info_set(info, "thread_level", "MPI_THREAD_MULTIPLE"), "MPI_Info_set");
    check(MPI_Session_init(info, MPI_ERRORS_RETURN, &session), "MPI_Session_init");
    MPI_Info_free(&info);
    check(MPI_Group_from_session_pset(session, "mpi://WORLD", &group), "MPI_Group_from_session_pset");
  }

  static const World& joined() {
    static const World world;
    return world;
  }
};

class MpiTransport : public Transport {
 public:
  MpiTransport(const std::vector<int>& members, const std::string& name) {
    MPI_Group group;
    const int size = static_cast<int>(members.size());
    check(MPI_Group_incl(World::joined().group, size, members.data(), &group), "MPI_Group_incl");
    check(MPI_Comm_create_from_group(group, name.c_str(), MPI_INFO_NULL, MPI_ERRORS_RETURN, &comm_),
          "MPI_Comm_create_from_group");
    MPI_Group_free(&group);
  }

  ~MpiTransport() override {
    MPI_Comm_free(&comm_);
  }

  void all_reduce(void* data, std::size_t count, c10::ScalarType type, Reduction reduction) override {
    const auto [element, op] = reducible(type, reduction);
    check(MPI_Allreduce_c(MPI_IN_PLACE, data, static_cast<MPI_Count>(count), element, op, comm_), "all-reduce");
  }

  void broadcast(void* data, std::size_t bytes, int root) override {
    check(MPI_Bcast_c(data, static_cast<MPI_Count>(bytes), MPI_BYTE, root, comm_), "broadcast");
  }

  void all_gather(const void* own, void* all, std::size_t bytes) override {
    const auto count = static_cast<MPI_Count>(bytes);
    check(MPI_Allgather_c(own, count, MPI_BYTE, all, count, MPI_BYTE, comm_), "all-gather");
  }

  void barrier() override {
    check(MPI_Barrier(comm_), "barrier");
  }

 private:
  MPI_Comm comm_ = MPI_COMM_NULL;
};

// `members` are ranks of MPI's world, in the order of the group; `name` tells groups made at the same time apart.
// The first group of a process must be the world.
c10::intrusive_ptr<c10d::Backend> create(std::vector<int> members, std::string name, int rank,
                                         std::chrono::milliseconds timeout) {
  const int size = static_cast<int>(members.size());
  auto connect = [members = std::move(members), name = std::move(name)]() -> std::unique_ptr<Transport> {
    return std::make_unique<MpiTransport>(members, name);
  };
  return c10::make_intrusive<TransportBackend>("mpi", rank, size, timeout, connect);
}

std::string version() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING];
  int length = 0;
  MPI_Get_library_version(text, &length);
  return std::string(text, length);
}

}  // namespace qlora

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("create", &qlora::create, pybind11::arg("members"), pybind11::arg("name"), pybind11::arg("rank"),
             pybind11::arg("timeout"), pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("version", &qlora::version);
}
