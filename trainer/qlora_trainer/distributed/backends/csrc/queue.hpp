// Tasks that run one after another in a thread of their own, and what c10d knows of each.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include <torch/csrc/distributed/c10d/Work.hpp>

namespace qlora {

// A collective under way. `wait` throws what the collective threw, or after the timeout.
class QueuedWork : public c10d::Work {
 public:
  QueuedWork(int rank, c10d::OpType type, std::string name, std::vector<at::Tensor> results,
             std::chrono::milliseconds timeout)
      : Work(rank, type),
        name_(std::move(name)),
        results_(std::move(results)),
        timeout_(timeout),
        future_(c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()))) {}

  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override {
    const auto limit = timeout == kNoTimeout ? timeout_ : timeout;
    std::unique_lock<std::mutex> lock(mutex_);
    const bool done = cv_.wait_for(lock, limit, [this] { return completed_; });
    TORCH_CHECK(done, name_, " timed out: a rank did not take part within ", limit.count(), " ms");
    if (exception_) {
      std::rethrow_exception(exception_);
    }
    return true;
  }

  std::vector<at::Tensor> result() override {
    return results_;
  }

  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    return future_;
  }

  void run(const std::function<void()>& collective) {
    try {
      collective();
    } catch (...) {
      future_->setErrorIfNeeded(std::current_exception());
      finish(std::current_exception());
      return;
    }
    future_->markCompleted(c10::IValue(results_));
    finish();
  }

 private:
  const std::string name_;
  const std::vector<at::Tensor> results_;
  const std::chrono::milliseconds timeout_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

// The thread may be stuck in a library for ever, so nothing here waits for it without a limit:
// it owns its state together with the queue, and is left behind when it does not come back.
class Queue {
 public:
  using Task = std::function<void()>;

  Queue() : state_(std::make_shared<State>()) {
    std::thread([state = state_] { state->run(); }).detach();
  }

  void add(Task task) {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    TORCH_CHECK(!state_->closing, "the process group was destroyed");
    state_->tasks.push_back(std::move(task));
    state_->changed.notify_all();
  }

  // Ends the thread once it has done what was added before; false when that takes longer.
  bool close(std::chrono::milliseconds limit) {
    std::unique_lock<std::mutex> lock(state_->mutex);
    state_->closing = true;
    state_->changed.notify_all();
    return state_->changed.wait_for(lock, limit, [this] { return state_->ended; });
  }

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Task> tasks;
    bool closing = false;
    bool ended = false;

    void run() {
      std::unique_lock<std::mutex> lock(mutex);
      while (true) {
        changed.wait(lock, [this] { return closing || !tasks.empty(); });
        if (tasks.empty()) {
          break;
        }
        Task task = std::move(tasks.front());
        tasks.pop_front();
        lock.unlock();
        task();
        task = nullptr;  // what it holds goes before anybody is told
        lock.lock();
      }
      ended = true;
      changed.notify_all();
    }
  };

  std::shared_ptr<State> state_;
};

}  // namespace qlora
