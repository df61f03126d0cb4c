# What the modules that Python and TensorFlow load have in common: they export the functions named and nothing else, so
# that no other library of the process takes an inline function or a type of theirs; they bring the C++ library along,
# so that a distribution older than the compiler's loads them; and they are hardened.

# bnfast_exports(TARGET NAME...)
function(bnfast_exports target)
  if(APPLE)
    foreach(name IN LISTS ARGN)
      target_link_options(${target} PRIVATE -Wl,-exported_symbol,_${name})
    endforeach()
    target_link_options(${target} PRIVATE -Wl,-dead_strip)
  else()
    list(JOIN ARGN "; " names)
    set(script ${CMAKE_CURRENT_BINARY_DIR}/${target}.map)
    file(CONFIGURE OUTPUT ${script} CONTENT "{ global: ${names}; local: *; };\n" @ONLY)
    target_link_options(${target} PRIVATE -Wl,--version-script=${script} -Wl,--gc-sections -Wl,-z,relro,-z,now)
    set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS ${script})
    if(BNFAST_STATIC_LIBSTDCXX)
      target_link_options(${target} PRIVATE -static-libstdc++)
    endif()
  endif()
  target_compile_options(${target} PRIVATE ${hardening} -ffunction-sections -fdata-sections)
  set_target_properties(${target} PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
endfunction()
