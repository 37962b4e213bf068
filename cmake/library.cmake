# libpdiff: the core as a shared library with headers and a CMake package, for hosts that are not Python.

add_library(pdiff SHARED ${capi_sources} ${core_objects})
add_library(pdiff::pdiff ALIAS pdiff)
target_link_libraries(pdiff PRIVATE $<BUILD_INTERFACE:pdiff_options>)
if(PDIFF_CUDA)
  target_link_libraries(pdiff PRIVATE $<BUILD_INTERFACE:CUDA::cudart_static>)
endif()
target_include_directories(pdiff PUBLIC
  $<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/csrc/include>
  $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_compile_features(pdiff INTERFACE cxx_std_20)
set(library_map ${CMAKE_CURRENT_SOURCE_DIR}/cmake/export_library.map)
target_link_options(pdiff PRIVATE -Wl,--exclude-libs,ALL -Wl,--version-script=${library_map})
set_target_properties(pdiff PROPERTIES
  VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR} LINK_DEPENDS ${library_map} LINKER_LANGUAGE CXX)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/pdiff)
install(TARGETS pdiff EXPORT pdiffTargets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT dev)
install(DIRECTORY csrc/include/pdiff DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT dev FILES_MATCHING PATTERN "*.h")
install(EXPORT pdiffTargets NAMESPACE pdiff:: DESTINATION ${package_dir} COMPONENT dev)
configure_package_config_file(cmake/pdiffConfig.cmake.in pdiffConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(pdiffConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/pdiffConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/pdiffConfigVersion.cmake
  DESTINATION ${package_dir} COMPONENT dev)
