# Sets cuda_sources: the launcher in C++, and kernel_sources_cpp among them, a C++ file that holds the text of every
# kernel header, for NVRTC.
set(files arguments.h device.h types.cuh layout.cuh moments.cuh finalize.cuh apply.cuh gradient.cuh
  grid_barrier.cuh sweeps.cuh channel.cuh resident.cuh instances.cuh)
set(text "#include \"cuda/compiler.h\"\n\nconst std::vector<bnfast::cuda::KernelSource>& bnfast::cuda::kernel_sources() {\n")
string(APPEND text "    static const std::vector<KernelSource> all = {\n")
foreach(file IN LISTS files)
  set(path ${CMAKE_CURRENT_LIST_DIR}/kernels/${file})
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${path})
  file(READ ${path} content)
  string(REGEX REPLACE " *//[^\n]*" "" content "${content}")  # comments and indentation would be a third of it
  string(REGEX REPLACE "\n +" "\n" content "${content}")
  string(APPEND text "        {\"${file}\", R\"bnfast(${content})bnfast\"},\n")
endforeach()
string(APPEND text "    };\n    return all;\n}\n")
set(kernel_sources_cpp ${CMAKE_CURRENT_BINARY_DIR}/cuda_kernel_sources.cpp)
file(CONFIGURE OUTPUT ${kernel_sources_cpp} CONTENT "${text}" @ONLY)
set(cuda_sources ${kernel_sources_cpp})
foreach(name IN ITEMS compiler driver image_cache kernel_id launch plan sha256)
  list(APPEND cuda_sources ${CMAKE_CURRENT_LIST_DIR}/${name}.cpp)
endforeach()
