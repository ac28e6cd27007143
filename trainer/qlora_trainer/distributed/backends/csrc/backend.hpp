// A c10d backend over a Transport: checks what it is given, then queues it.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include "queue.hpp"
#include "transport.hpp"

namespace qlora {

class TransportBackend : public c10d::Backend {
 public:
  using Connect = std::function<std::unique_ptr<Transport>()>;
  using Millis = std::chrono::milliseconds;
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;

  // `connect` runs in the group's thread. Throws when it fails or takes longer than the timeout.
  TransportBackend(std::string name, int rank, int size, Millis timeout, Connect connect)
      : Backend(rank, size), name_(std::move(name)), timeout_(timeout) {
    auto made = submit(c10d::OpType::UNKNOWN, "connecting the ranks", {}, timeout,
                       [slot = slot_, connect = std::move(connect)] { *slot = connect(); });
    made->wait();
  }

  const std::string getBackendName() const override {
    return name_;
  }

  void setTimeout(Millis timeout) override {
    timeout_ = timeout;
  }

  WorkPtr allreduce(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& opts) override {
    const at::Tensor tensor = only(tensors, "all-reduce");
    const bool mean = opts.reduceOp == c10d::ReduceOp::AVG;
    TORCH_CHECK(!mean || tensor.is_floating_point(), "all-reduce: AVG needs floating-point numbers, not ",
                tensor.scalar_type());
    const Reduction how = reduction(opts.reduceOp);
    return submit(c10d::OpType::ALLREDUCE, "all-reduce", {tensor}, opts.timeout, [=, slot = slot_, size = size_] {
      if (tensor.numel() > 0) {
        (*slot)->all_reduce(tensor.data_ptr(), tensor.numel(), tensor.scalar_type(), how);
      }
      if (mean) {
        at::Tensor(tensor).div_(size);
      }
    });
  }

  WorkPtr broadcast(std::vector<at::Tensor>& tensors, const c10d::BroadcastOptions& opts) override {
    const at::Tensor tensor = only(tensors, "broadcast");
    const int root = static_cast<int>(opts.rootRank);
    TORCH_CHECK(root >= 0 && root < size_, "broadcast: the source is rank ", root, " of ", size_);
    return submit(c10d::OpType::BROADCAST, "broadcast", {tensor}, opts.timeout, [=, slot = slot_] {
      if (tensor.nbytes() > 0) {
        (*slot)->broadcast(tensor.data_ptr(), tensor.nbytes(), root);
      }
    });
  }

  WorkPtr allgather(std::vector<std::vector<at::Tensor>>& outputs, std::vector<at::Tensor>& inputs,
                    const c10d::AllgatherOptions& opts) override {
    const at::Tensor own = only(inputs, "all-gather");
    TORCH_CHECK(outputs.size() == 1 && outputs[0].size() == static_cast<std::size_t>(size_),
                "all-gather: one list of ", size_, " tensors is needed");
    const std::vector<at::Tensor> all = outputs[0];
    for (const at::Tensor& each : all) {
      same_kind(own, each, own.numel());
    }
    return submit(c10d::OpType::ALLGATHER, "all-gather", all, opts.timeout, [=, slot = slot_, size = size_] {
      at::Tensor flat = at::empty({size, own.numel()}, own.options());
      gather(**slot, own, flat);
      for (int rank = 0; rank < size; ++rank) {
        at::Tensor(all[rank]).copy_(flat[rank].view_as(all[rank]));
      }
    });
  }

  WorkPtr all_gather_single(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& opts) override {
    const at::Tensor own = dense(input, "all-gather");
    const at::Tensor all = dense(output, "all-gather");
    same_kind(own, all, own.numel() * size_);
    return submit(c10d::OpType::_ALLGATHER_BASE, "all-gather", {all}, opts.timeout,
                  [=, slot = slot_] { gather(**slot, own, all); });
  }

  WorkPtr barrier(const c10d::BarrierOptions& opts) override {
    return submit(c10d::OpType::BARRIER, "barrier", {}, opts.timeout, [slot = slot_] { (*slot)->barrier(); });
  }

  // Waits for what is under way, no longer than the timeout; what never ends is left behind.
  void shutdown() override {
    if (!closed_) {
      closed_ = true;
      queue_.add([slot = slot_] { slot->reset(); });
      queue_.close(timeout_);
    }
  }

  void abort() override {
    closed_ = true;
    queue_.close(Millis(0));
  }

 private:
  // Left as it is by a backend that nobody shut down: at the end of a process it is too late for
  // the library to take leave of its peers.
  using Slot = std::shared_ptr<std::unique_ptr<Transport>>;

  WorkPtr submit(c10d::OpType type, const std::string& name, std::vector<at::Tensor> results,
                 Millis limit, std::function<void()> collective) {
    auto work = c10::make_intrusive<QueuedWork>(rank_, type, name_ + " " + name, std::move(results),
                                                limit == c10d::kUnsetTimeout ? timeout_ : limit);
    queue_.add([work, collective = std::move(collective)] { work->run(collective); });
    return work;
  }

  static at::Tensor dense(const at::Tensor& tensor, const char* operation) {
    TORCH_CHECK(tensor.device().is_cpu(), operation, ": the tensor is on ", tensor.device(), ", not on the CPU");
    TORCH_CHECK(tensor.layout() == at::kStrided && tensor.is_contiguous(), operation,
                ": the tensor must be dense and contiguous");
    return tensor;
  }

  static at::Tensor only(const std::vector<at::Tensor>& tensors, const char* operation) {
    TORCH_CHECK(tensors.size() == 1, operation, ": one tensor a rank is needed, not ", tensors.size());
    return dense(tensors[0], operation);
  }

  static void same_kind(const at::Tensor& own, const at::Tensor& output, int64_t elements) {
    TORCH_CHECK(output.device().is_cpu() && output.scalar_type() == own.scalar_type() && output.numel() == elements,
                "all-gather: an output has ", output.numel(), " elements of type ", output.scalar_type(),
                " and must have ", elements, " of type ", own.scalar_type());
  }

  static Reduction reduction(const c10d::ReduceOp& op) {
    switch (op) {
      case c10d::ReduceOp::SUM:
      case c10d::ReduceOp::AVG:
        return Reduction::sum;
      case c10d::ReduceOp::PRODUCT:
        return Reduction::product;
      case c10d::ReduceOp::MIN:
        return Reduction::min;
      case c10d::ReduceOp::MAX:
        return Reduction::max;
      default:
        TORCH_CHECK(false, "all-reduce: only SUM, AVG, PRODUCT, MIN and MAX are supported");
    }
  }

  static void gather(Transport& transport, const at::Tensor& own, const at::Tensor& all) {
    if (own.nbytes() > 0) {
      transport.all_gather(own.data_ptr(), all.data_ptr(), own.nbytes());
    }
  }

  const std::string name_;
  Millis timeout_;
  bool closed_ = false;
  Slot slot_ = std::make_shared<std::unique_ptr<Transport>>();
  Queue queue_;
};

}  // namespace qlora
