// Runs a converted model, packaged by package.py, without Python: the ops come from the binary of dynops.
//
//     run model.pt2 dynops/_C.cpython-312-x86_64-linux-gnu.so inputs.pt outputs.pt
//
// inputs.pt is a tuple of tensors that torch.save wrote; outputs.pt becomes one too.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>

static std::vector<at::Tensor> load(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  const c10::IValue tuple = torch::pickle_load(bytes);
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& value : tuple.toTupleRef().elements()) tensors.push_back(value.toTensor());
  return tensors;
}

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: run MODEL.pt2 DYNOPS_C.so INPUTS.pt OUTPUTS.pt\n";
    return 2;
  }
  if (!dlopen(argv[2], RTLD_NOW | RTLD_GLOBAL)) {  // registers the ops
    std::cerr << dlerror() << "\n";
    return 1;
  }
  const torch::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const std::vector<at::Tensor> inputs = load(argv[3]);
  std::vector<at::Tensor> outputs = model.run(inputs);  // the first call packs the weights
  const auto begin = std::chrono::steady_clock::now();
  outputs = model.run(inputs);
  const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - begin;
  const std::vector<char> bytes = torch::pickle_save(
      c10::ivalue::Tuple::create(std::vector<c10::IValue>(outputs.begin(), outputs.end())));
  std::ofstream(argv[4], std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
  std::cout << time.count() << " ms\n";
  return 0;
}
