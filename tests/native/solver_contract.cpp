// Checks what the header of the solvers promises and Python cannot see: no allocation, no write
// outside the workspace and the outputs, weights untouched on failure, the same bits with a
// workspace full of NaN. Linked with -Wl,--wrap=malloc. Prints the number of solves.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "aligned_mtl.h"
#include "bargaining.h"
#include "cagrad.h"
#include "dual_cone.h"
#include "fairgrad.h"
#include "imtl_g.h"
#include "mgda.h"
#include "pcgrad.h"
#include "simplex.h"

static bool counting = false;
static long allocations = 0;

extern "C" void* __real_malloc(std::size_t size);
extern "C" void* __wrap_malloc(std::size_t size) {
  allocations += counting;
  return __real_malloc(size);
}
void* operator new(std::size_t size) { return __wrap_malloc(size); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }

using namespace fastmto::solvers;

namespace {

constexpr double kCanary = -12345.678;
constexpr double kTiny = std::numeric_limits<double>::min();
constexpr double kAny = -std::numeric_limits<double>::max();
long solves = 0;

void require(bool condition, const char* what, int tasks) {
  if (condition) return;
  std::printf("failed: %s at %d tasks\n", what, tasks);
  std::exit(1);
}

template <typename Solve>
void check(int tasks, std::size_t workspace_size, double lowest, const Solve& solve) {
  constexpr int kGuard = 64;
  std::vector<double> first;
  for (double fill : {0.0, std::numeric_limits<double>::quiet_NaN()}) {
    std::vector<double> memory(workspace_size + 2 * kGuard + 8, kCanary);
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data() + kGuard);
    double* workspace = memory.data() + kGuard + (64 - address % 64) % 64 / sizeof(double);
    for (std::size_t i = 0; i < workspace_size; ++i) workspace[i] = fill;
    std::vector<double> weights(tasks + 2, kCanary);
    Info info{-1, -1.0, -1.0};
    counting = true;
    const Status status = solve(workspace, weights.data() + 1, &info);
    counting = false;
    ++solves;
    for (double* p = memory.data(); p < workspace; ++p)
      require(*p == kCanary, "write before the workspace", tasks);
    for (double* p = workspace + workspace_size; p < memory.data() + memory.size(); ++p)
      require(*p == kCanary, "write after the workspace", tasks);
    require(weights.front() == kCanary && weights.back() == kCanary, "write outside weights", tasks);
    for (int i = 1; i <= tasks; ++i) {
      if (status == Status::kSolved) {
        require(weights[i] >= lowest && std::isfinite(weights[i]), "weights", tasks);
      } else {
        require(weights[i] == kCanary, "weights written on failure", tasks);
      }
    }
    require(info.iterations >= 0 && std::isfinite(info.residual) && std::isfinite(info.kappa),
            "info", tasks);
    if (first.empty()) {
      first = weights;
    } else {
      require(first == weights, "the same bits", tasks);
    }
  }
}

}  // namespace

int main() {
  std::mt19937_64 engine(1);
  std::normal_distribution<double> normal;
  for (int tasks : {1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 33, 64, 70}) {
    for (int kind = 0; kind < 9; ++kind) {
      const int length = kind == 1 ? (tasks + 2) / 3 : tasks + 3;
      std::vector<double> rows(tasks * length), gram(tasks * tasks), start(tasks), p(tasks);
      for (double& x : rows) x = normal(engine);
      if (kind == 2 && tasks > 1)
        for (int j = 0; j < length; ++j) rows[j] = -rows[length + j] * (1.0 + 1e-5 * normal(engine));
      for (int i = 0; i < tasks; ++i) {
        const double scale = kind == 3 ? std::pow(10.0, 4.0 * normal(engine)) : 1.0;
        for (int j = 0; j < length; ++j) rows[i * length + j] *= scale;
        start[i] = std::exp(normal(engine));
        p[i] = std::exp(normal(engine));
      }
      for (int i = 0; i < tasks; ++i)
        for (int j = 0; j < tasks; ++j) {
          double sum = 0.0;
          for (int k = 0; k < length; ++k) sum += rows[i * length + k] * rows[j * length + k];
          gram[i * tasks + j] = sum;
        }
      if (kind == 4) gram[0] = std::numeric_limits<double>::infinity();
      if (kind == 5) gram[tasks * tasks - 1] = 0.0;
      if (kind == 6) gram[tasks - 1] += 1.0;
      if (kind == 8) {
        for (int i = 0; i < tasks; ++i) gram[i] = gram[i * tasks] = 0.0;
      }
      std::vector<std::int64_t> orders;
      for (int i = 0; i < tasks; ++i)
        for (int k = 1; k < tasks; ++k) orders.push_back((i + k) % tasks);
      const Problem problem{tasks, gram.data(), kind % 2 ? p.data() : nullptr, kind == 7 ? 0.1 : 0};
      check(tasks, exact_workspace(tasks), kTiny, [&](double* w, double* a, Info* info) {
        return bargaining_exact(problem, kind == 3 ? start.data() : nullptr, 1e-12, w, a, info);
      });
      check(tasks, ccp_workspace(tasks), kTiny, [&](double* w, double* a, Info* info) {
        return bargaining_ccp(problem, nullptr, 3, 1e-9, w, a, info);
      });
      check(tasks, ccp_workspace(tasks), kTiny, [&](double* w, double* a, Info* info) {
        return ccp_step(problem, start.data(), w, a, info);
      });
      check(tasks, mgda_workspace(tasks), 0.0, [&](double* w, double* a, Info* info) {
        return mgda(tasks, gram.data(), w, a, info);
      });
      for (double c : {0.4, 2.0}) {
        check(tasks, cagrad_workspace(tasks), 0.0, [&](double* w, double* a, Info* info) {
          return cagrad(tasks, gram.data(), c, w, a, info);
        });
      }
      check(tasks, dual_cone_workspace(tasks), 0.0, [&](double* w, double* a, Info* info) {
        return dual_cone(tasks, gram.data(), p.data(), w, a, info);
      });
      check(tasks, dual_cone_workspace(tasks), 0.0, [&](double* w, double* a, Info* info) {
        return upgrad(tasks, gram.data(), nullptr, w, a, info);
      });
      check(tasks, imtl_g_workspace(tasks), kAny, [&](double* w, double* a, Info* info) {
        return imtl_g(tasks, gram.data(), w, a, info);
      });
      check(tasks, aligned_mtl_workspace(tasks), kAny, [&](double* w, double* a, Info* info) {
        return aligned_mtl(tasks, gram.data(), Scale::kMedian, 0.0, w, a, info);
      });
      for (double alpha : {0.5, 3.0}) {
        check(tasks, fairgrad_workspace(tasks), kTiny, [&](double* w, double* a, Info* info) {
          return fairgrad(tasks, gram.data(), alpha, w, a, info);
        });
      }
      check(tasks, pcgrad_workspace(tasks), 0.0, [&](double* w, double* a, Info* info) {
        return pcgrad(tasks, gram.data(), orders.data(), w, a, info);
      });
      check(tasks, 0, 0.0, [&](double*, double* a, Info* info) {
        return simplex_projection(tasks, start.data(), a, info);
      });
    }
  }
  require(allocations == 0, "allocation", static_cast<int>(allocations));
  std::printf("%ld\n", solves);
  return 0;
}
